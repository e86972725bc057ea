"""Tests of prepare_flickr.py: formats, archives, skipping, splits, user mistakes. Offline."""
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_flickr
from nanocaption import cli
from nanocaption.cli import UserError
from nanocaption.dataset import Dataset
from nanocaption.images import load_image
from test_captions import CAPTIONS, write_formats
from test_download import mirror  # noqa: F401, a fixture
from test_images import as_bytes, random_image

LISTS = {"train": ["1.jpg", "2_x"], "val": ["3.jpg"]}  # with and without the extension


def call(capsys, *args):
    """Runs the command in this process; returns its exit code, stdout and stderr."""
    capsys.readouterr()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_flickr.py", *map(str, args)])
        try:
            cli.run(prepare_flickr.main)
        except SystemExit as end:
            code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def succeeds(capsys, *args):
    """Runs a command that must succeed; returns its stdout."""
    code, out, err = call(capsys, *args)
    assert code == 0, err
    return out


def fails(capsys, *args, code=2):
    """Runs a command that must fail with one line on stderr; returns the line."""
    found, _, err = call(capsys, *args)
    assert found == code and err.count("\n") == 1, (found, err)
    assert err.startswith("prepare_flickr.py: error: "), err
    return err


def contents(folder):
    """{file name: bytes} of all binaries, texts and the tokenizer of a prepared folder."""
    files = {}
    for path in Path(folder).iterdir():
        if path.suffix in (".bin", ".jsonl", ".tiktoken"):
            files[path.name] = path.read_bytes()
    return files


def texts(folder, split):
    """{name: captions} of a split."""
    data = Dataset(folder).split(split)
    return dict(zip(data.names, data.captions, strict=True))


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records))


@pytest.fixture
def source(tmp_path):
    """A folder of images (in subfolders), captions as JSON lines, and lists for splits."""
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for seed, name in enumerate(CAPTIONS):
        folder = "deep" if seed else "."
        random_image(seed).save(tmp_path / "images" / folder / name)
    records = [{"image": name, "captions": captions} for name, captions in CAPTIONS.items()]
    write_jsonl(tmp_path / "captions.jsonl", records)
    for split, ids in LISTS.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return tmp_path


def arguments(source, out="out", **changed):
    """The arguments that prepare `source`; None removes an option."""
    options = {
        "images": source / "images",
        "captions": source / "captions.jsonl",
        "image_size": 16,
        "workers": 2,
        "split_files": [source / "train.txt", source / "val.txt"],
        "out_dir": source / out,
        **changed,
    }
    args = ["--allow_missing"]
    for name, value in options.items():
        if isinstance(value, list):
            args += [f"--{name}", *value]
        elif value is not None:
            args += [f"--{name}", value]
    return args


# ------------------------------------------------------------------------------------------------
# formats and archives


def test_every_format_gives_the_same_data(source, capsys):
    folders = {}
    for n, (name, text) in enumerate(write_formats().items()):
        path = source / f"captions{n}"
        path.write_bytes(text.encode())
        out = succeeds(capsys, *arguments(source, f"out{n}", captions=path))
        assert "skipped images: 0, captions: 1" in out, name  # the empty one
        assert "empty" in (source / f"out{n}" / "skipped.txt").read_text()
        folders[name] = contents(source / f"out{n}")
    for name, files in folders.items():
        assert files == folders["token"], name
    expected = {}
    for name in ("1.jpg", "2_x.jpg"):
        expected[name] = [" ".join(text.split()) for text in CAPTIONS[name]]
    assert texts(source / "out0", "train") == expected


def test_archives_and_workers_give_the_same_bytes(source, capsys):
    folder = source / "images"
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "1.jpg").write_text("resource fork")
    (folder / "deep" / "._2_x.jpg").write_text("resource fork")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for name, compression in (("a.zip", zipfile.ZIP_STORED), ("b.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(source / name, "w", compression) as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
    for name, mode in (("a.tar", "w"), ("b.tar.gz", "w:gz")):
        with tarfile.open(source / name, mode) as archive:
            for path in reversed(files):  # another order than in the captions
                parent = "__MACOSX" if "MACOSX" in str(path) else "./photos"
                archive.add(path, f"{parent}/{path.name}")
    results = []
    for images in ("images", "a.zip", "b.zip", "a.tar", "b.tar.gz"):
        for workers in (1, 3):
            out = f"{images}-{workers}"
            changed = dict(images=source / images, workers=workers)
            succeeds(capsys, *arguments(source, out, **changed))
            results.append(contents(source / out))
    assert all(result == results[0] for result in results)
    images = Dataset(source / "images-1").split("train").read_images(range(2))
    for image, name in zip(images, ("1.jpg", "deep/2_x.jpg"), strict=True):
        assert np.array_equal(image, load_image(folder / name, 16))


def test_two_images_with_the_same_name(source, capsys):
    (source / "images" / "other").mkdir()
    random_image(9).save(source / "images" / "other" / "3.jpg")
    error = fails(capsys, *arguments(source, split_files=None))
    assert "3.jpg may be deep/3.jpg or other/3.jpg" in error
    (source / "images" / "other" / "3.jpg").unlink()
    shutil.copy(source / "images" / "1.jpg", source / "images" / "deep" / "1.jpg")
    records = []
    for n, name in enumerate(("deep/1.jpg", "photos/1.jpg", "elsewhere/3")):
        records.append({"image": name, "captions": [f"{name} {n}"], "split": "train"})
    write_jsonl(source / "captions.jsonl", records)
    # there is no folder "photos": that name gets no image, not even another's
    succeeds(capsys, *arguments(source, split_files=None))
    assert texts(source / "out", "train") == {"1.jpg": ["deep/1.jpg 0"], "3.jpg": ["elsewhere/3 2"]}


@pytest.fixture
def twice(tmp_path):
    """A folder and a zip that hold 0.png and 1.png twice, and captions.jsonl."""
    (tmp_path / "cls" / "a" / "a").mkdir(parents=True)
    for n in range(2):
        for folder in ("a", "a/a"):
            random_image(n).save(tmp_path / "cls" / folder / f"{n}.png")
    for name in ("cls.zip", "cls.tar", "cls.tar.gz"):
        format = {".zip": "zip", ".tar": "tar", ".gz": "gztar"}[Path(name).suffix]
        shutil.make_archive(str(tmp_path / "cls"), format, tmp_path / "cls")
    records = [{"image": f"{n}.png", "captions": [f"{n}"], "split": "train"} for n in range(2)]
    write_jsonl(tmp_path / "captions.jsonl", records)
    return tmp_path


@pytest.mark.parametrize("images", ["cls", "cls.zip", "cls.tar"])
def test_of_equal_files_the_least_deep_is_taken(twice, capsys, images):
    changed = dict(images=twice / images, split_files=None)
    out = succeeds(capsys, *arguments(twice, **changed))
    assert "images without captions or not in any list: 2, such as a/a/0.png" in out
    assert texts(twice / "out", "train") == {"0.png": ["0"], "1.png": ["1"]}


def test_other_files_with_the_same_name_are_an_error(twice, capsys):
    random_image(9).save(twice / "cls" / "a" / "a" / "1.png")
    error = fails(capsys, *arguments(twice, images=twice / "cls", split_files=None))
    assert "1.png may be a/1.png or a/a/1.png" in error
    # not compared: that would take another pass
    error = fails(capsys, *arguments(twice, images=twice / "cls.tar.gz", split_files=None))
    assert "0.png may be a/0.png or a/a/0.png" in error


def test_metadata_in_the_folder_of_its_images(tmp_path, capsys):
    """Hugging Face's imagefolder, with the same names in both splits."""
    files = []
    for split in ("train", "val"):
        folder = tmp_path / "data" / split
        folder.mkdir(parents=True)
        random_image(len(split)).save(folder / "0.png")
        write_jsonl(folder / "metadata.jsonl", [{"file_name": "0.png", "text": f"a {split} dog"}])
        files.append(f"{split}={folder}/metadata.jsonl")
    changed = dict(images=tmp_path / "data", captions=files, split_files=None)
    succeeds(capsys, *arguments(tmp_path, **changed))
    for split in ("train", "val"):
        assert texts(tmp_path / "out", split) == {f"{split}/0.png": [f"a {split} dog"]}
        [image] = Dataset(tmp_path / "out").split(split).read_images([0])
        assert np.array_equal(image, load_image(tmp_path / "data" / split / "0.png", 16))


@pytest.mark.parametrize("prefix", ["", "cls/", "../data/cls/", "{folder}/cls/"])
def test_names_with_more_folders_than_the_paths(twice, capsys, prefix):
    prefix = prefix.format(folder=twice)
    random_image(9).save(twice / "cls" / "a" / "a" / "1.png")
    names = ["a/0.png", "a/a/0.png", "a/1.png", "a/a/1.png"]
    random_image(8).save(twice / "cls" / "0.png")
    names += ["0.png"] if prefix in ("", "cls/", f"{twice}/cls/") else []
    records = []
    for name in names:
        records.append({"image": prefix + name, "captions": [name], "split": "train"})
    write_jsonl(twice / "captions.jsonl", records)
    out = succeeds(capsys, *arguments(twice, images=twice / "cls", split_files=None))
    assert "skipped images: 0, captions: 0" in out
    assert texts(twice / "out", "train") == {name: [name] for name in names}


def test_linked_folders_are_read_and_watched(source, capsys):
    (source / "images" / "deep").rename(source / "elsewhere")
    (source / "images" / "deep").symlink_to(source / "elsewhere")
    (source / "images" / "loop").symlink_to(source / "images")
    out = succeeds(capsys, *arguments(source))
    assert "skipped images: 0, captions: 1" in out
    assert "is up to date" in succeeds(capsys, *arguments(source))
    os.utime(source / "elsewhere" / "3.jpg", (2e9, 2e9))
    assert "images has changed" in fails(capsys, *arguments(source))


def test_unicode_names(source, capsys):
    """NFC captions, NFD files: one name, one split, the same data."""
    results = []
    for out, form in (("nfc", "NFC"), ("nfd", "NFD")):
        folder = source / f"images-{form}"
        folder.mkdir()
        records = []
        for n in range(40):
            random_image(n).save(folder / unicodedata.normalize(form, f"é{n}.png"))
            records.append({"image": f"é{n}.png", "captions": [f"é{n}"]})
        write_jsonl(source / "captions.jsonl", records)
        succeeds(capsys, *arguments(source, out, images=folder, split_files=None))
        results.append(contents(source / out))
        assert Dataset(source / out).split("train").names[0].startswith("é")
    assert results[0] == results[1]


# ------------------------------------------------------------------------------------------------
# what is skipped


@pytest.fixture
def many(tmp_path):
    """200 images."""
    (tmp_path / "images").mkdir()
    for n in range(200):
        random_image(n, (8, 8)).save(tmp_path / "images" / f"{n:03}.png")
    return tmp_path


def many_arguments(many, captions, *more):
    """The arguments that prepare `many` with captions {name: caption}, all in train."""
    records = []
    for name, text in captions.items():
        records.append({"image": name, "captions": [text], "split": "train"})
    write_jsonl(many / "captions.jsonl", records)
    return ["--images", many / "images", "--captions", many / "captions.jsonl",
            "--out_dir", many / "out", "--image_size", 8, "--workers", 2, *more]


def test_unreadable_images_leave_no_row_and_one_percent_is_the_limit(many, capsys):
    captions = {f"{n:03}.png": f"number {n}" for n in range(200)}
    for name in ("003.png", "077.png"):
        (many / "images" / name).write_text("broken")
    out = succeeds(capsys, *many_arguments(many, captions))
    assert "skipped images: 2, captions: 0" in out
    assert "003.png" in (many / "out" / "skipped.txt").read_text()
    train = Dataset(many / "out").split("train")
    assert len(train) == len(train.names) == 198
    images = train.read_images(range(198))
    for image, name in zip(images, train.names):
        assert np.array_equal(image, load_image(many / "images" / name, 8))
    assert train.captions == [[captions[name]] for name in train.names]

    (many / "images" / "100.png").write_text("broken")
    error = fails(capsys, *many_arguments(many, captions, "--force"))
    assert "3 of 200 images can't be used" in error
    assert not (many / "out" / "meta.json").exists()
    succeeds(capsys, *many_arguments(many, captions, "--allow_missing"))
    assert len(Dataset(many / "out").split("train")) == 197


@pytest.mark.parametrize("record, lack", [
    ({"image": "000.png", "label": "dog"}, "no caption text (captions, caption"),
    ({"path": "000.png", "caption": "A dog"}, "no image name (image, image_name"),
])
def test_no_usable_caption(many, capsys, record, lack):
    write_jsonl(many / "captions.jsonl", [record, record])
    args = many_arguments(many, {})
    write_jsonl(many / "captions.jsonl", [record, record])
    error = fails(capsys, *args, "--allow_missing")
    assert "record 1" in error and lack in error
    assert (many / "out" / "skipped.txt").exists()
    assert (many / "out" / "skipped.txt").read_text().count("caption\t") == 2


def test_a_heic_photo_is_named(many, capsys):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (many / "images" / "IMG_1.HEIC").write_bytes(heic)
    captions = {f"{n:03}.png": f"number {n}" for n in range(200)} | {"IMG_1": "a dog"}
    succeeds(capsys, *many_arguments(many, captions))
    skipped = (many / "out" / "skipped.txt").read_text()
    assert "IMG_1.HEIC" in skipped and "HEIC, which Pillow can't decode" in skipped


def test_captions_without_images(many, capsys):
    captions = {f"{n:03}.png": f"number {n}" for n in range(2, 200)}
    captions |= {"x.png": "a", "y.png": "b"}
    out = succeeds(capsys, *many_arguments(many, captions))
    assert "skipped images: 0, captions: 2" in out
    assert "images without captions or not in any list: 2" in out
    captions["004.png"] = " "
    error = fails(capsys, *many_arguments(many, captions, "--force"))
    assert "3 of 200 captions can't be used" in error
    assert (many / "out" / "meta.json").exists()  # nothing was touched


# ------------------------------------------------------------------------------------------------
# splits


def test_lists(source, capsys):
    # 1 twice, and 4 has no captions
    (source / "train.txt").write_text("\ufeff1\r\n1.jpg\r\n2_x.jpg\r\n\r\n4.jpg\r\n")
    out = succeeds(capsys, *arguments(source, split_files=[source / "train.txt"]))
    assert "skipped images: 1," in out
    assert "captioned images not in any list: 1" in out
    assert "val images: 0, but training needs at least 2" in out
    assert list(Dataset(source / "out").splits) == ["train"]
    error = fails(capsys, *arguments(source, split_files=None))
    assert f"out was prepared with --split_files {source}/train.txt, but now it is without" in error
    (source / "val.txt").write_text("2_x")
    assert "2_x.jpg is in two lists" in fails(capsys, *arguments(source, "new"))
    (source / "train.txt").write_text("nobody")
    (source / "val.txt").write_text("3")
    error = fails(capsys, *arguments(source, "new"))
    assert "nothing to train on: no name in" in error and "train.txt has captions" in error


def test_without_a_usable_caption_the_first_record_is_explained(source, capsys):
    write_jsonl(source / "captions.jsonl", [{"image": "1.jpg", "question": "Why?"}] * 2)
    error = fails(capsys, *arguments(source, split_files=None))
    assert "record 1: no caption text" in error and "0 names" not in error
    lines = (source / "out/skipped.txt").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("caption\t")


def test_a_split_file_in_another_encoding_is_explained(source, capsys):
    (source / "train.txt").write_bytes("1.jpg\n".encode("utf-16"))
    assert "train.txt is UTF-16" in fails(capsys, *arguments(source))


def test_a_small_folder_has_two_val_images():
    for before, after in (
        ("train train train train", "train val val train"),
        ("train test train val", "train val train val"),
        ("train train test", "train val val"),
        ("train train", "train val"),
        ("train val val test", "train val val test"),
    ):
        splits = dict(enumerate(before.split()))
        prepare_flickr.fill_val(splits)
        assert list(splits.values()) == after.split()
    many = {f"{n}.jpg": prepare_flickr.hashed_split(f"{n}.jpg") for n in range(1000)}
    before = dict(many)
    prepare_flickr.fill_val(many)
    assert many == before


def test_the_hashed_split_is_90_5_5_and_stable():
    hashed_split = prepare_flickr.hashed_split
    count = Counter(hashed_split(f"{n}.jpg") for n in range(10000))
    assert abs(count["train"] - 9000) < 150
    assert abs(count["val"] - 500) < 100
    assert abs(count["test"] - 500) < 100
    for name in ("a/17.jpg", "17", "17.png"):
        assert hashed_split(name) == hashed_split("17.jpg")


def test_caption_files_with_their_split(source, capsys):
    for split, name in (("train", "1"), ("test", "3")):
        (source / f"{split}.token").write_text(f"{name}.jpg#0\tA {split} caption\n")
    files = [f"train={source}/train.token", f"test={source}/test.token"]
    succeeds(capsys, *arguments(source, captions=files, split_files=None))
    assert texts(source / "out", "test") == {"3.jpg": ["A test caption"]}
    files[1] = f"{source}/test.token"
    error = fails(capsys, *arguments(source, "new", captions=files, split_files=None))
    assert "3.jpg has no split" in error


# ------------------------------------------------------------------------------------------------
# running again, interruptions, the binaries


def test_again_does_nothing_and_other_arguments_need_force(source, capsys):
    succeeds(capsys, *arguments(source))
    before = {path: path.stat().st_mtime_ns for path in (source / "out").iterdir()}
    assert "is up to date" in succeeds(capsys, *arguments(source, workers=1))
    after = {path: path.stat().st_mtime_ns for path in (source / "out").iterdir()}
    assert before == after
    error = fails(capsys, *arguments(source, image_size=8))
    assert "--image_size 16, but now it is with --image_size 8" in error and "--force" in error
    os.utime(source / "captions.jsonl", (1, 1))
    assert "captions.jsonl has changed" in fails(capsys, *arguments(source))
    changed = dict(image_size=8, split_files=[source / "train.txt"])
    succeeds(capsys, *arguments(source, **changed), "--force")
    assert not (source / "out" / "val.jsonl").exists()
    assert Dataset(source / "out").image_size == 8


def test_inputs_are_not_overwritten(source, capsys):
    (source / "out").mkdir()
    captions = source / "out" / "train.jsonl"
    shutil.copy(source / "captions.jsonl", captions)
    error = fails(capsys, *arguments(source, captions=captions))
    assert "train.jsonl would be overwritten" in error
    assert captions.read_bytes() == (source / "captions.jsonl").read_bytes()


def test_an_interrupted_run_leaves_no_meta(source, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    succeeds(capsys, *arguments(source))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_flickr, "write_texts", interrupt)
        result = call(capsys, *arguments(source), "--force")
    assert result == (130, "", "prepare_flickr.py: interrupted\n")
    assert not (source / "out" / "meta.json").exists()
    succeeds(capsys, *arguments(source))


def test_atomic_write_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), cli.atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        1 / 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_is_used_by_one_process(tmp_path):
    (tmp_path / "file.tmp123").write_text("left behind")
    with cli.lock_folder(tmp_path):
        assert os.listdir(tmp_path) == [".lock"]
        with pytest.raises(UserError, match="another process is using"):
            cli.lock_folder(tmp_path)
    cli.lock_folder(tmp_path).close()


def test_binaries_agree_with_the_texts(source, capsys):
    succeeds(capsys, *arguments(source))
    out = source / "out"
    dataset = Dataset(out)
    encoding = dataset.tokenizer
    assert dataset.vocab_size == encoding.n_vocab == encoding.eot_token + 1
    assert json.loads(json.dumps(dataset.meta)) == dataset.meta
    for name, count in dataset.splits.items():
        split = dataset.split(name)
        tokens = np.fromfile(out / f"{name}_tokens.bin", np.uint16)
        assert split.caption_start.dtype == split.image_start.dtype == np.int64
        assert len(split) == len(split.names) == count["images"]
        assert len(tokens) == split.caption_start[-1] == count["tokens"]
        assert len(split.caption_start) - 1 == split.image_start[-1] == count["captions"]
        assert split.caption_start[0] == split.image_start[0] == 0
        assert (tokens[split.caption_start[1:] - 1] == encoding.eot_token).all()
        longest = 0
        found = split.read_tokens(range(len(split)))
        for ids_of_image, texts_of_image in zip(found, split.captions, strict=True):
            for ids, text in zip(ids_of_image, texts_of_image, strict=True):
                assert encoding.decode(ids) == text
                assert ids == encoding.encode_ordinary(text)
                longest = max(longest, len(ids) + 1)
        assert longest == count["longest"]
    train = dataset.split("train")
    images = train.read_images(range(len(train)))
    assert images.shape == (2, 16, 16, 3) and images.dtype == np.uint8
    pixels = images.reshape(-1, 3) / 255
    assert np.allclose(dataset.mean, pixels.mean(0))
    assert np.allclose(dataset.std, pixels.std(0))


# ------------------------------------------------------------------------------------------------
# other tokenizers, download


def test_tokenizer_of_another_folder_or_checkpoint(source, capsys):
    succeeds(capsys, *arguments(source, "first"))
    succeeds(capsys, *arguments(source, "second", tokenizer=source / "first"))
    assert contents(source / "second") == contents(source / "first")
    ranks = (source / "first" / "tokenizer.tiktoken").read_bytes()
    checkpoint = source / "best.pt"
    torch.save({"tokenizer": {"ranks": ranks, "pattern": r"\S+|\s"}}, checkpoint)
    for n, path in enumerate((source, checkpoint)):
        succeeds(capsys, *arguments(source, f"third{n}", tokenizer=path))
        assert Dataset(source / f"third{n}").meta["pattern"] == r"\S+|\s"
    torch.save({"model": {}}, checkpoint)
    error = fails(capsys, *arguments(source, tokenizer=checkpoint))
    assert "not a checkpoint with a tokenizer" in error
    checkpoint.write_text("nonsense")
    assert "not a checkpoint" in fails(capsys, *arguments(source, tokenizer=checkpoint))
    error = fails(capsys, *arguments(source, tokenizer=source / "images"))
    assert "expected bpe, gpt2" in error


def test_keep_used_keeps_the_tokens_ids(source, capsys):
    succeeds(capsys, *arguments(source, "all"))
    full = Dataset(source / "all")
    # a checkpoint whose tokens have other ids in a pretrained decoder
    ids = list(range(1000, 1000 + full.vocab_size))
    tokenizer = {"ranks": full.tokenizer_text, "pattern": ".+", "ids": ids}
    torch.save({"tokenizer": tokenizer}, source / "best.pt")
    changed = dict(tokenizer=source / "best.pt", split_files=[source / "val.txt"])
    succeeds(capsys, *arguments(source, "used", **changed), "--keep_used")
    used = Dataset(source / "used")
    assert used.vocab_size == len(used.token_ids) < full.vocab_size
    assert used.ranks == [full.ranks[n - 1000] for n in used.token_ids[:-1]]
    assert used.token_ids[-1] == ids[-1]


def test_flickr30k_from_a_mirror(mirror, source, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(source)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name in CAPTIONS:
            file.writestr(f"flickr30k-images/{name}", as_bytes(random_image(1)))
    captions = write_formats()["nlphuji"].replace("restval", "train")
    mirror.files = {
        "/flickr30k-images.zip": archive.getvalue(),
        "/flickr_annotations_30k.csv": captions.encode(),
    }
    args = ["--url", mirror.url, "--out_dir", source / "out", "--image_size", 16,
            "--allow_missing", "--workers", 1]
    assert "expected Karpathy's split" in fails(capsys, *args)
    monkeypatch.setattr(prepare_flickr, "FLICKR30K", {"train": 2, "val": 1})
    mirror.script[:] = ["drop"]
    succeeds(capsys, *args)
    counts = {split: n["images"] for split, n in Dataset(source / "out").splits.items()}
    assert counts == {"train": 2, "val": 1}

    # what was downloaded is kept
    n = len(mirror.seen)
    succeeds(capsys, *args, "--out_dir", source / "again", "--delete_archive")
    assert len(mirror.seen) == n
    assert not os.path.exists("data/flickr30k/flickr30k-images.zip")
    assert "is up to date" in succeeds(capsys, *args)
    assert len(mirror.seen) == n
    mirror.script[:] = ["404"]
    error = fails(capsys, *args, "--force", "--out_dir", source / "new", code=1)
    assert "HTTP 404" in error


# ------------------------------------------------------------------------------------------------
# the user's mistakes


@pytest.mark.parametrize("changed, message", [
    ({"image_sise": 16}, "did you mean --image_size?"),
    ({"image_size": "big"}, "invalid int value"),
    ({"image_size": 0}, "image_size must be between 8 and 4096, not 0"),
    ({"vocab_size": 100}, "vocab_size must be between 257 and 65536, not 100"),
    ({"images": "nowhere"}, "nowhere: no such file"),
    ({"images": None}, "both --images and --captions"),
    ({"images": __file__}, "not a folder, a zip or a complete tar"),
    ({"captions": "nowhere"}, "nowhere: no such file"),
    ({"captions": __file__}, "unknown format"),
    ({"split_files": ["nowhere"]}, "nowhere: no such file"),
    ({"split_files": ["a", "b", "c", "d"]}, "found 4 files"),
    ({"url": "http://x"}, "--url and --delete_archive are only for downloading"),
    ({"images": None, "captions": None, "url": "ftp://x"}, "expected http:// or https://"),
    ({"tokenizer": "nowhere"}, "--tokenizer nowhere: expected bpe, gpt2"),
    ({"tokenizer": "images/nowhere"}, "--tokenizer images/nowhere: expected bpe, gpt2"),
])
def test_mistakes_are_one_line(source, capsys, monkeypatch, changed, message):
    monkeypatch.chdir(source)
    assert message in fails(capsys, *arguments(source, **changed))
    assert not (source / "out" / "meta.json").exists()


def test_out_dir_inside_images_and_a_cut_archive(source, capsys):
    assert "is inside --images" in fails(capsys, *arguments(source, images=source))
    with tarfile.open(source / "whole.tar.gz", "w:gz") as archive:
        archive.add(source / "images")
    data = (source / "whole.tar.gz").read_bytes()
    (source / "cut.tar.gz").write_bytes(data[:len(data) // 2])
    error = fails(capsys, *arguments(source, images=source / "cut.tar.gz"))
    assert "a complete tar" in error


def test_the_command_itself(source):
    script = prepare_flickr.__file__
    args = [str(arg) for arg in arguments(source, images=source / "none")]
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    code = "import prepare_flickr, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(script).parent)
    assert done.returncode == 0
