"""Tests of prepare_flickr.py: formats, archives, odd pictures, BPE, downloads, mistakes. Offline, under a minute."""
import http.server
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import threading
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from PIL import Image

import bpe
import common
import prepare_flickr as pf
from common import UserError

SHARED = Path(__file__).parent.parent / "shared"
FORMATS = SHARED / "formats"
needs_formats = pytest.mark.skipif(not FORMATS.exists(), reason=f"no sample files at {FORMATS}")

# Captions that break careless readers: quotes, commas, bars, the end-of-text marker, accents, hashes, tabs' neighbours.
CAPTIONS = {
    "1.jpg": ["A dog , a cat and a bird .", 'A sign that says " active . "', '"', "A man | a plan | a canal"],
    "2_x.jpg": ["<|endoftext|> is not the end", "Crème brûlée naïve – 犬 🐕", "two\u2028lines, one caption",
                "A 5\" board"],
    "3.jpg": ["it's #1 : a {brace} [bracket]", "  spaces   inside  ", "don't , won't", "", "a"],
}
LISTS = {"train": ["1.jpg", "2_x"], "val": ["3.jpg"]}  # with and without the extension


def call(capsys, *args):
    """Runs the command in this process: (exit code, stdout, stderr)."""
    capsys.readouterr()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_flickr.py", *map(str, args)])
        try:
            common.run(pf.main)
        except SystemExit as end:
            code = end.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fails(capsys, *args, code=2):
    """Runs a command that must fail in one line; returns the line."""
    got, _, err = call(capsys, *args)
    assert got == code and err.count("\n") == 1 and err.startswith("prepare_flickr.py: error: "), (got, err)
    return err


def picture(seed, size=(48, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def as_bytes(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def contents(folder):
    """The bytes of all binaries, texts and the tokenizer of a prepared folder."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()
            if path.suffix in (".bin", ".jsonl", ".tiktoken")}


@pytest.fixture
def source(tmp_path):
    """A folder of pictures (in subfolders), captions as JSON lines, and lists for splits."""
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for seed, name in enumerate(CAPTIONS):
        picture(seed).save(tmp_path / "pictures" / ("deep" if seed else "") / name)
    lines = [json.dumps({"image": name, "captions": texts}) for name, texts in CAPTIONS.items()]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    for split, ids in LISTS.items():
        (tmp_path / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return tmp_path


def arguments(source, out="out", **changed):
    options = {"images": source / "pictures", "captions": source / "captions.jsonl", "image_size": 16, "workers": 2,
               "split_files": [source / "train.txt", source / "val.txt"], "out_dir": source / out} | changed
    args = ["--allow_missing"]
    for key, value in options.items():
        if value is not None:
            args += [f"--{key}", *(value if isinstance(value, list) else [value])]
    return args


# ---------------------------------------------------------------------------------------------------------------------
# formats


def csv_line(*fields):
    """RFC 4180, by hand: a field with a quote or a comma is quoted, and its quotes doubled."""
    return ",".join('"' + field.replace('"', '""') + '"' if set(field) & set('",') else field for field in fields)


def write_formats():
    """The same captions as every format: {name: text}."""
    pairs = [(name, n, text) for name, texts in CAPTIONS.items() for n, text in enumerate(texts)]
    split = {"1.jpg": "train", "2_x.jpg": "restval", "3.jpg": "val"}
    token = [f"{name}#{n}\t{text}" for name, n, text in pairs]
    ids = {name: 100 + n for n, name in enumerate(CAPTIONS)}
    coco = {"info": {}, "images": [{"id": ids[name], "file_name": name} for name in CAPTIONS],
            "annotations": [{"id": 7, "image_id": ids[name], "caption": text} for name, _, text in pairs]}
    karpathy = {"dataset": "x", "images": [
        {"filename": name, "filepath": "deep", "split": split[name],
         "sentences": [{"raw": text, "tokens": []} for text in texts]} for name, texts in CAPTIONS.items()]
        + [{"filename": "none.jpg", "split": "test", "sentences": []}]}
    return {
        "token": "\n".join(token) + "\n",
        "token with CRLF and a BOM": "\ufeff" + "\r\n".join(token) + "\r\n",
        "Kaggle captions.txt": "\n".join(["image,caption", *(csv_line(name, text) for name, _, text in pairs)]),
        "Kaggle results.csv": "\n".join(["image_name| comment_number| comment",
                                         *(f"{name}| {n}| {text}" for name, n, text in pairs)]),
        "Kaggle with commas": "\r\n".join(["image_name,comment_number,comment",
                                           *(csv_line(name, str(n), text) for name, n, text in pairs)]),
        "nlphuji": "\n".join(["raw,sentids,split,filename,img_id",
                              *(csv_line(json.dumps(texts), "[0, 1]", split[name], name, "0")
                                for name, texts in CAPTIONS.items())]),
        "Karpathy": json.dumps(karpathy),
        "COCO": json.dumps(coco, indent=1),
        "HanCai98": json.dumps({name: [*texts, f"flickr30k-images/{name}"] for name, texts in CAPTIONS.items()}),
        "JSON lines": "\n".join(json.dumps({"image": name[:-4], "captions": texts}, ensure_ascii=False)
                                for name, texts in CAPTIONS.items()),
        "JSON list": json.dumps([{"image": f"./{name}", "captions": texts} for name, texts in CAPTIONS.items()]),
    }


def test_every_format_gives_the_same_data(source, capsys):
    folders = {}
    for n, (name, text) in enumerate(write_formats().items()):
        path = source / f"captions{n}"
        path.write_bytes(text.encode())
        code, out, err = call(capsys, *arguments(source, f"out{n}", captions=path))
        assert code == 0, (name, err)
        assert "skipped 0 pictures and 1 captions" in out, name  # the empty one
        folders[name] = contents(source / f"out{n}")
        assert "empty" in (source / f"out{n}" / "skipped.txt").read_text()
    for name, files in folders.items():
        assert files == folders["token"], name
    records = [json.loads(line) for line in folders["token"]["train.jsonl"].decode().split("\n")[:-1]]
    assert records == [{"image": name, "captions": [" ".join(text.split()) for text in CAPTIONS[name]]}
                       for name in ("1.jpg", "2_x.jpg")]


def test_splits_in_the_file(source):
    for name in ("nlphuji", "Karpathy"):
        (source / "file").write_text(write_formats()[name])
        splits = {Path(image).name: split for image, _, split in pf.read_captions(source / "file")}
        assert splits == {"1.jpg": "train", "2_x.jpg": "train", "3.jpg": "val"}, name


@needs_formats
@pytest.mark.parametrize("file, count, last", [
    ("flickr8k_token.sample.token.txt", 32, None),  # with the original's 2258277193_586949ec62.jpg.1
    ("flickr8k_token.crlf_variant.sample.txt", 3, ("1000268201_693b08cb0e.jpg",
                                                   "A little girl climbing into a wooden playhouse .", None)),
    ("kaggle_flickr8k_captions.sample.captions.txt", 18, (
        "1401961581_76921a75c5.jpg", "A girl sits in a harness ready to lift up into the air and behind her is a sign "
        'that says " active . "', None)),
    ("kaggle_flickr30k_results.QUOTED.sample.csv", 16, ("2199200615.jpg", "A dog runs across the grass .", None)),
    ("flickr30k_results_20130124.QUOTED.sample.token", 5, None),
    ("nlphuji_flickr_annotations_30k.RECONSTRUCTED.csv", 5, ("1000092795.jpg", "Two friends enjoy time spent together.",
                                                             "train")),
    ("karpathy_dataset_flickr8k.sample.json", 10, None),
    ("karpathy_schema_ucm.sample.json", 15, None),
    ("flickr30k_splits/hancai_test.json", 5000, None),
])
def test_genuine_files(file, count, last):
    captions = pf.read_captions(FORMATS / file)
    assert len(captions) == count
    assert last in (None, tuple(" ".join(x.split()) if x else x for x in captions[-1]))
    assert all(name.endswith((".jpg", ".tif", ".jpg.1")) for name, _, _ in captions)
    assert all(text and not text.endswith(".jpg") for _, text, _ in captions)


def test_malformed_lines_are_listed(tmp_path):
    files = {
        "a.token": "1.jpg#0\tA dog\nno tab here\n\n1.jpg#1\tA cat\n",
        "b.csv": 'image,caption\n1.jpg,A dog\n1.jpg,one, too many\n1.jpg,"never closed\n1.jpg,"A, cat"\n',
        "c.csv": "image_name| comment_number| comment\n1.jpg| 0| A dog\njust text\n1.jpg| 1| A, cat\n",
        "d.jsonl": '{"image": "1.jpg", "captions": ["A dog"]}\n{"image": "1.jpg", "capt\n{"image": "2.jpg"}\n'
                   '{"image": "2.jpg", "captions": [3]}\n{"image": "1.jpg", "captions": ["A cat"]}\n[]\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        skipped = []
        names, texts, _ = zip(*pf.read_captions(tmp_path / name, skipped))
        assert names == ("1.jpg", "1.jpg")
        assert [text.strip().replace(",", "") for text in texts] == ["A dog", "A cat"], name
        assert len(skipped) == {"a": 1, "b": 2, "c": 1, "d": 4}[name[0]], skipped
        where = "record 2" if name[0] == "d" else "line 2" if name[0] == "a" else "line 3"
        assert skipped[0].startswith(f"{tmp_path / name}, {where}: ")
        with pytest.raises(UserError, match=where):
            pf.read_captions(tmp_path / name)


def test_a_quoted_caption_may_hold_line_ends(tmp_path):
    (tmp_path / "c.csv").write_text('image,caption\n1.jpg,"two\nlines"\n2.jpg,one\n')
    assert pf.read_captions(tmp_path / "c.csv") == [("1.jpg", "two\nlines", None), ("2.jpg", "one", None)]


@pytest.mark.parametrize("data, message", [
    (b"", "empty"),
    ("1.jpg#0\tcaf\xe9\n".encode("latin-1"), "line 1: not UTF-8"),
    (b"what is this\n", "unknown format"),
    (b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}', "no known layout"),
    (b'[{"image_id": 1, "caption": "x"}]', "COCO results"),
    (b'{"images": [', "neither JSON nor"),
    (b'{"image": "1.jpg", "captions": ["x"], "split": "trian"}', "split 'trian', expected train"),
    (b'{"image": "1.jpg", "captions": ["\\ud83d"]}\n{"image": "1.jpg"}', "record 2: no picture's name with captions"),
])
def test_unusable_caption_files(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=message):
        pf.read_captions(tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# pictures


def test_archives_and_workers_give_the_same_bytes(source, capsys):
    folder = source / "pictures"
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "1.jpg").write_text("resource fork")
    (folder / "deep" / "._2_x.jpg").write_text("resource fork")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for name, compression in (("stored.zip", zipfile.ZIP_STORED), ("deflated.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(source / name, "w", compression) as archive:
            for path in files:
                archive.write(path, path.relative_to(folder))
    for name, mode in (("plain.tar", "w"), ("packed.tar.gz", "w:gz")):
        with tarfile.open(source / name, mode) as archive:
            for path in reversed(files):  # another order than the captions'
                archive.add(path, f"./photos/{path.name}" if "MACOSX" not in str(path) else f"__MACOSX/{path.name}")
    results = []
    for images in ("pictures", "stored.zip", "deflated.zip", "plain.tar", "packed.tar.gz"):
        for workers in (1, 3):
            out = f"{images}-{workers}"
            code, _, err = call(capsys, *arguments(source, out, images=source / images, workers=workers))
            assert code == 0, err
            results.append(contents(source / out))
    assert all(result == results[0] for result in results)
    rows = pf.read_split(source / "pictures-1", "train")["images"]
    for row, name in zip(rows, ("1.jpg", "deep/2_x.jpg"), strict=True):
        assert np.array_equal(row, pf.load_image(folder / name, 16))


def two_halves(mode="RGB", left=(255, 0, 0), right=(0, 0, 255), size=(40, 20)):
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


@pytest.mark.parametrize("image, format, left, right", [
    (two_halves(), "PNG", (255, 0, 0), (0, 0, 255)),  # squashed, not cropped
    (two_halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "PNG", (255, 255, 255), (0, 0, 255)),
    (two_halves("LA", (0, 0), (90, 255)), "PNG", (255, 255, 255), (90, 90, 90)),
    (two_halves("L", 10, 200), "PNG", (10, 10, 10), (200, 200, 200)),
    (two_halves("1", 0, 1), "PNG", (0, 0, 0), (255, 255, 255)),
    (two_halves("I;16", 0, 51 * 256), "PNG", (0, 0, 0), (51, 51, 51)),
    (two_halves("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), "TIFF", (0, 0, 0), (255, 255, 255)),
    (two_halves("F", 0., 77.), "TIFF", (0, 0, 0), (77, 77, 77)),
])
def test_modes(image, format, left, right):
    array = pf.load_image(as_bytes(image, format), 20)
    assert array.shape == (20, 20, 3) and array.dtype == np.uint8
    assert (array[:, :7] == left).all() and (array[:, 13:] == right).all()


def test_palette_with_transparency_and_animation():
    image = two_halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    clear = image.getpixel((0, 0))
    array = pf.load_image(as_bytes(image, "PNG", transparency=clear), 20)
    assert (array[:, :7] == 255).all() and (array[:, 13:] == (0, 0, 255)).all()
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    assert (pf.load_image(as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]), 4) == (255, 0, 0)).all()


def test_exif_turns_the_picture_upright_and_broken_exif_does_not_matter():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left half goes up
    array = pf.load_image(as_bytes(two_halves(), "PNG", exif=exif), 20)
    assert (array[:7] == (255, 0, 0)).all() and (array[13:] == (0, 0, 255)).all()
    broken = as_bytes(two_halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    assert pf.load_image(broken, 20)[10, 2, 0] > 200


def test_a_large_jpeg_is_decoded_small_but_well():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = as_bytes(image, "JPEG", quality=95)
    oracle = np.asarray(Image.open(io.BytesIO(data)).resize((160, 160), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(pf.load_image(data, 160) - oracle).mean() < 1


def test_unreadable_pictures_are_one_line(tmp_path, monkeypatch):
    good = as_bytes(picture(0, (200, 200)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(good[:len(good) // 2])
    (tmp_path / "text.jpg").write_text("not a picture\n")
    for source in (tmp_path / "cut.jpg", tmp_path / "text.jpg", tmp_path / "none.jpg", tmp_path, b"", io.BytesIO(b"x")):
        with pytest.raises(UserError, match="not a readable picture: .") as error:
            pf.load_image(source, 8)
        assert "\n" not in str(error.value)
        assert not isinstance(source, Path) or str(error.value).startswith(str(source))
    monkeypatch.setattr(pf, "PIXELS", 100)
    with pytest.raises(UserError, match="too many"):
        pf.load_image(as_bytes(picture(0, (200, 200)), "PNG"), 8)
    assert pf.load_image(good, 8).shape == (8, 8, 3)  # a JPEG that is decoded small may have more


def test_two_pictures_of_one_name(source, capsys):
    shutil.copy(source / "pictures" / "1.jpg", source / "pictures" / "deep" / "1.jpg")
    err = fails(capsys, *arguments(source, split_files=None))
    assert "1.jpg may be 1.jpg or deep/1.jpg" in err
    lines = [{"image": name, "captions": [f"{name} {n}"], "split": "train"} for n, name in
             enumerate(("deep/1.jpg", "pictures/1.jpg", "elsewhere/3"))]
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # The folder above is part of nobody's path in the source: that name stays without a picture, and takes no other's.
    assert call(capsys, *arguments(source, split_files=None))[0] == 0
    assert pf.read_records(source / "out", "train") == [{"image": "1.jpg", "captions": ["deep/1.jpg 0"]},
                                                        {"image": "3.jpg", "captions": ["elsewhere/3 2"]}]


# ---------------------------------------------------------------------------------------------------------------------
# what is left out


@pytest.fixture
def many(tmp_path):
    """200 pictures of one caption each, all in train."""
    (tmp_path / "pictures").mkdir()
    data = as_bytes(picture(0, (8, 8)))
    for n in range(200):
        (tmp_path / "pictures" / f"{n:03}.png").write_bytes(data if n % 2 else as_bytes(picture(n, (8, 8))))
    return tmp_path


def many_arguments(many, captions, *more):
    lines = [json.dumps({"image": name, "captions": [text], "split": "train"}) for name, text in captions.items()]
    (many / "captions.jsonl").write_text("\n".join(lines))
    return ["--images", many / "pictures", "--captions", many / "captions.jsonl", "--out_dir", many / "out",
            "--image_size", 8, "--workers", 2, *more]


def test_unreadable_pictures_leave_no_row_and_one_percent_is_the_limit(many, capsys):
    captions = {f"{n:03}.png": f"number {n}" for n in range(200)}
    for n in (3, 77):
        (many / "pictures" / f"{n:03}.png").write_text("broken")
    code, out, err = call(capsys, *many_arguments(many, captions))
    assert code == 0 and "skipped 2 pictures and 0 captions" in out, err
    rows, records = pf.read_split(many / "out", "train")["images"], pf.read_records(many / "out", "train")
    assert len(rows) == len(records) == 198 and "003.png" in (many / "out" / "skipped.txt").read_text()
    for row, record in zip(rows, records):
        assert np.array_equal(row, pf.load_image(many / "pictures" / record["image"], 8))
        assert record["captions"] == [captions[record["image"]]]
    (many / "pictures" / "100.png").write_text("broken")
    assert "3 of 200 pictures can't be used" in fails(capsys, *many_arguments(many, captions, "--force"))
    assert not (many / "out" / "meta.json").exists()
    assert call(capsys, *many_arguments(many, captions, "--allow_missing"))[0] == 0
    assert pf.load_meta(many / "out")["splits"]["train"]["images"] == 197


def test_captions_without_pictures(many, capsys):
    captions = {f"{n:03}.png": f"number {n}" for n in range(2, 200)} | {"x.png": "a", "y.png": "b"}
    code, out, _ = call(capsys, *many_arguments(many, captions))
    assert code == 0 and "skipped 0 pictures and 2 captions" in out and "2 pictures of" in out
    captions["004.png"] = " "
    assert "3 of 200 captions can't be used" in fails(capsys, *many_arguments(many, captions, "--force"))
    assert (many / "out" / "meta.json").exists()  # nothing was touched


# ---------------------------------------------------------------------------------------------------------------------
# splits, running again, the binaries


def test_lists(source, capsys):
    (source / "train.txt").write_text("\ufeff1\r\n1.jpg\r\n2_x.jpg\r\n\r\n4.jpg\r\n")  # 1 twice, 4 has no captions
    code, out, _ = call(capsys, *arguments(source, split_files=[source / "train.txt"]))
    assert code == 0 and "skipped 1 pictures" in out and "1 pictures with captions are in no list" in out
    assert list(pf.load_meta(source / "out")["splits"]) == ["train"]
    (source / "val.txt").write_text("2_x")
    assert "2_x.jpg is in two lists" in fails(capsys, *arguments(source, "new"))
    (source / "train.txt").write_text("nobody")
    (source / "val.txt").write_text("3")
    assert "nothing to train on" in fails(capsys, *arguments(source, "new"))


def test_split_by_hash_is_90_5_5_and_steady():
    splits = Counter(pf.hashed_split(f"{n}.jpg") for n in range(10000))
    assert abs(splits["train"] - 9000) < 150 and abs(splits["val"] - 500) < 100 and abs(splits["test"] - 500) < 100
    assert [pf.hashed_split(name) for name in ("a/17.jpg", "17", "17.png")] == [pf.hashed_split("17.jpg")] * 3


def test_files_with_their_split(source, capsys):
    for split, name in (("train", "1"), ("test", "3")):
        (source / f"{split}.token").write_text(f"{name}.jpg#0\tA {split} caption\n")
    files = [f"train={source}/train.token", f"test={source}/test.token"]
    assert call(capsys, *arguments(source, captions=files, split_files=None))[0] == 0
    assert pf.read_records(source / "out", "test") == [{"image": "3.jpg", "captions": ["A test caption"]}]
    files[1] = f"{source}/test.token"
    assert "3.jpg has no split" in fails(capsys, *arguments(source, "new", captions=files, split_files=None))


def test_again_does_nothing_and_other_arguments_need_force(source, capsys):
    assert call(capsys, *arguments(source))[0] == 0
    before = {path: path.stat().st_mtime_ns for path in (source / "out").iterdir()}
    code, out, _ = call(capsys, *arguments(source, workers=1))
    assert code == 0 and "nothing to do" in out
    assert before == {path: path.stat().st_mtime_ns for path in (source / "out").iterdir()}
    err = fails(capsys, *arguments(source, image_size=8))
    assert "--image_size 16, now it is 8" in err and "--force" in err
    os.utime(source / "captions.jsonl", (1, 1))
    assert "captions.jsonl has changed" in fails(capsys, *arguments(source))
    assert call(capsys, *arguments(source, image_size=8, split_files=[source / "train.txt"]), "--force")[0] == 0
    assert not (source / "out" / "val.jsonl").exists() and pf.load_meta(source / "out")["image_size"] == 8


def test_an_interrupted_run_leaves_no_meta(source, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    assert call(capsys, *arguments(source))[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(pf, "write_texts", interrupt)
        assert call(capsys, *arguments(source), "--force") == (130, "", "prepare_flickr.py: interrupted\n")
    assert not (source / "out" / "meta.json").exists()
    assert call(capsys, *arguments(source))[0] == 0


def test_atomic_write_keeps_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), common.atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        1 / 0
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_binaries_say_what_the_texts_say(source, capsys):
    assert call(capsys, *arguments(source))[0] == 0
    meta, encoding = pf.load_meta(source / "out"), pf.load_tokenizer(source / "out")
    assert meta["vocab_size"] == encoding.n_vocab == encoding.eot_token + 1
    for split, n in meta["splits"].items():
        data, records = pf.read_split(source / "out", split), pf.read_records(source / "out", split)
        assert {key: array.dtype for key, array in data.items()} == {
            "images": np.uint8, "tokens": np.uint16, "captions": np.int64, "index": np.int64}
        assert data["images"].shape == (n["images"], 16, 16, 3)
        assert len(data["tokens"]) == n["tokens"] == data["captions"][-1]
        assert data["index"][-1] == len(data["captions"]) - 1 == n["captions"]
        assert data["index"][0] == data["captions"][0] == 0
        for picture_n, record in enumerate(records):
            first, last = data["index"][picture_n:picture_n + 2]
            for c, text in zip(range(first, last), record["captions"], strict=True):
                *tokens, eot = data["tokens"][data["captions"][c]:data["captions"][c + 1]].tolist()
                assert encoding.decode(tokens) == text and eot == encoding.eot_token
                assert tokens == encoding.encode_ordinary(text) and len(tokens) < n["longest"] + 1
    pixels = pf.read_split(source / "out", "train")["images"].reshape(-1, 3) / 255
    assert np.allclose(meta["mean"], pixels.mean(0)) and np.allclose(meta["std"], pixels.std(0))
    assert json.loads(json.dumps(meta)) == meta


def test_write_dataset(tmp_path):
    images = [pf.load_image(as_bytes(picture(n)), 8) for n in range(3)]
    splits = {"train": (["a", "b"], [["one dog", "two dogs"], ["three"]], iter(images[:2])),
              "val": (["c"], [["four"]], images[2:])}
    meta = pf.write_dataset(tmp_path, splits, 8, vocab_size=300, source={"made": "here"})
    assert meta == pf.load_meta(tmp_path) and meta["source"] == {"made": "here"}
    assert np.array_equal(pf.read_split(tmp_path, "train")["images"], images[:2])
    assert pf.read_records(tmp_path, "val") == [{"image": "c", "captions": ["four"]}]
    with pytest.raises(ValueError, match="expected uint8"):
        pf.write_dataset(tmp_path, {"train": (["a"], [["x"]], [np.zeros((8, 9, 3), np.uint8)])}, 8)
    with pytest.raises(UserError, match="no meta.json"):
        pf.load_meta(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer


def reference_bpe(texts, vocab_size):
    """The definition, slowly: after each token, tiktoken itself encodes every word, and all pairs are counted anew."""
    words = Counter(word for text in texts for word in regex.findall(bpe.GPT2_PATTERN, text))
    ranks = [bytes([b]) for b in range(256)]
    while len(ranks) < vocab_size - 1:
        encoding, pairs = bpe.make_tokenizer(ranks), Counter()
        for word, count in words.items():
            parts = encoding.decode_tokens_bytes(encoding.encode_ordinary(word))
            for left, right in zip(parts, parts[1:]):
                pairs[left + right] += count
        for token in ranks:
            pairs.pop(token, None)
        if not pairs or max(pairs.values()) < 2:
            break
        ranks.append(min(pairs, key=lambda token: (-pairs[token], token)))
    return ranks


def test_bpe_is_its_definition():
    rng = random.Random(0)
    nouns = ["dog", "dogs", "doggo", "banana", "bandana", "running", "ran", "it's", "they're", "2012", "!!", "crème"]
    captions = [" ".join(rng.choices(nouns, k=6)) for _ in range(40)]
    assert bpe.train_bpe(captions, 340) == reference_bpe(captions, 340)
    for seed in range(8):  # few letters: overlapping pairs, and tokens that can be made in many ways
        rng = random.Random(seed)
        texts = ["".join(rng.choices("aab ", k=rng.randint(1, 30))) for _ in range(30)]
        assert bpe.train_bpe(texts, 300) == reference_bpe(texts, 300), seed


def test_bpe_splits_as_the_pattern_says_on_any_unicode():
    rng = random.Random(0)
    # Characters that Python's and regex's Unicode versions both know; each text twice, so that whole words are learned.
    known = [chr(c) for c in range(sys.maxunicode + 1)
             if unicodedata.category(chr(c)) not in ("Cn", "Cs") and regex.fullmatch(r"\P{Cn}", chr(c))]
    likely = " \t\n'\u00a0\u2028_-.9aé²½Ⅷ一\x1c\x85"
    texts = ["".join(rng.choice(known if rng.random() < .3 else likely) for _ in range(25)) for _ in range(60)]
    learned = bpe.train_bpe(texts * 2, 65536)
    encoding = bpe.make_tokenizer(learned)
    for word in (word for text in texts for word in regex.findall(bpe.GPT2_PATTERN, text)):
        assert len(encoding.encode_ordinary(word)) == 1, repr(word)
    whole = {word.encode() for text in texts for word in regex.findall(bpe.GPT2_PATTERN, text)}
    assert all(any(token in word for word in whole) for token in learned[256:])


@pytest.mark.skipif(not (SHARED / "flickr8k").exists(), reason=f"no Flickr8k at {SHARED}")
def test_bpe_on_flickr8k_encodes_any_text():
    texts = [text for _, text, _ in pf.read_captions(SHARED / "flickr8k" / "Flickr8k.token.txt")][:5000]
    ranks = bpe.train_bpe(texts, 2000)
    encoding = bpe.make_tokenizer(ranks)
    assert len(ranks) == 1999 and len(set(ranks)) == 1999 and bpe.text_to_ranks(bpe.ranks_to_text(ranks)) == ranks
    assert all(encoding.decode(encoding.encode_ordinary(text)) == text for text in texts + CAPTIONS["2_x.jpg"])
    assert encoding.eot_token not in encoding.encode_ordinary("<|endoftext|>")
    assert np.mean([len(encoding.encode_ordinary(text)) for text in texts]) < 15  # 54 bytes, 11.5 words


def test_tokenizer_of_others(source, capsys, monkeypatch):
    assert call(capsys, *arguments(source, "first"))[0] == 0
    assert call(capsys, *arguments(source, "second", tokenizer=source / "first"))[0] == 0
    assert contents(source / "second") == contents(source / "first")
    torch = pytest.importorskip("torch")
    ranks = (source / "first" / "tokenizer.tiktoken").read_bytes()
    torch.save({"tokenizer": {"ranks": ranks, "pattern": r"\S+|\s"}}, source / "best.pt")
    for n, path in enumerate((source, source / "best.pt")):
        assert call(capsys, *arguments(source, f"third{n}", tokenizer=path))[0] == 0
        assert pf.load_meta(source / f"third{n}")["pattern"] == r"\S+|\s"
    torch.save({"model": {}}, source / "best.pt")
    assert "not a checkpoint that holds a tokenizer" in fails(capsys, *arguments(source, tokenizer=source / "best.pt"))
    (source / "best.pt").write_text("nonsense")
    assert "not a checkpoint" in fails(capsys, *arguments(source, tokenizer=source / "best.pt"))
    assert "not bpe, gpt2" in fails(capsys, *arguments(source, tokenizer=source / "pictures"))


def test_gpt2(source, capsys, monkeypatch):
    if not (SHARED / "tiktoken_cache").exists():
        pytest.skip(f"no GPT-2 tokenizer at {SHARED / 'tiktoken_cache'}")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken_cache"))
    assert call(capsys, *arguments(source, tokenizer="gpt2"))[0] == 0
    gpt2, ours = tiktoken.get_encoding("gpt2"), pf.load_tokenizer(source / "out")
    assert (ours.n_vocab, ours.eot_token) == (gpt2.n_vocab, gpt2.eot_token) == (50257, 50256)
    for text in sum(CAPTIONS.values(), []):
        assert ours.encode_ordinary(text) == gpt2.encode_ordinary(text)


# ---------------------------------------------------------------------------------------------------------------------
# downloads


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves server.files; each request takes the next word of server.script, which says what goes wrong with it."""
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        trouble = self.server.script.pop(0) if self.server.script else "ok"
        self.server.seen.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        if trouble.isdigit():
            return self.reply(int(trouble), b"no")
        if trouble == "redirect":
            return self.reply(302, b"", Location="/signed" + self.path)
        if trouble == "change":
            self.server.files = {path: body[::-1] for path, body in self.server.files.items()}
        body = self.server.files.get(self.path.removeprefix("/signed"))
        if body is None:
            return self.reply(404, b"no")
        etag, asked = f'"{hash(body)}"', self.headers.get("Range")
        begin, headers, status = 0, {"ETag": etag}, 200
        if asked and trouble != "no ranges" and (self.headers["If-Range"] == etag or trouble == "change"):
            begin, status = int(asked[6:-1]), 206
            if begin >= len(body):
                return self.reply(416, b"", **{"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        rest = body[begin:]
        self.reply(status, rest[:len(rest) // 2] if trouble == "drop" else rest, len(rest), **headers)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setattr(common, "WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.handle_error = lambda *_: None  # a client that hangs up is what some tests are about
        server.files, server.seen, server.script = {"/file": random.Random(0).randbytes(1 << 20)}, [], []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("script, requests", [
    (["ok"], 1), (["drop", "ok"], 2), (["drop", "drop", "drop", "ok"], 4), (["drop", "no ranges"], 2),
    (["drop", "change", "ok"], 3),  # the changed file's rest comes as if it were the old one's: begun anew
    (["503", "429", "500", "ok"], 4), (["redirect", "drop", "redirect", "ok"], 4), (["drop", "416", "ok"], 3),
])
def test_download_survives(mirror, tmp_path, script, requests):
    mirror.script[:] = script
    common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == mirror.files["/file"]
    assert sorted(os.listdir(tmp_path)) == ["file", "file.lock"]
    assert len(mirror.seen) == requests
    if script[:2] == ["drop", "ok"]:
        begin = int(mirror.seen[1][1][6:-1])
        assert 0 < begin <= 1 << 19 and mirror.seen[1][2]  # only the rest was asked for, and only if it's the same file
    if "redirect" in script:
        assert [path for path, _, _ in mirror.seen] == ["/file", "/signed/file"] * 2  # the original address again


def test_download_goes_on_after_a_restart(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "TRIES", 1)
    mirror.script[:] = ["drop", "500"]
    with pytest.raises(OSError, match="what came is kept"):
        common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").exists()
    common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == mirror.files["/file"] and mirror.seen[-1][1]
    # Whole, but killed before it had its name; and a download that is there is not asked for.
    (tmp_path / "file").rename(tmp_path / "file.part")
    (tmp_path / "file.part.tag").write_text(f'"{hash(mirror.files["/file"])}"')
    common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    n = len(mirror.seen)
    common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == mirror.files["/file"] and len(mirror.seen) == n


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_download_is_refused_at_once(mirror, tmp_path, status):
    mirror.script[:] = [status]
    with pytest.raises(OSError, match=f"HTTP {status}.*mirror"):
        common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert len(mirror.seen) == 1 and os.listdir(tmp_path) == ["file.lock"]


def test_download_gives_up(mirror, tmp_path, monkeypatch):
    mirror.script[:] = ["503"] * 100
    with pytest.raises(OSError, match="gave up.*503"):
        common.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert len(mirror.seen) == common.TRIES
    mirror.script.clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="make room"):
        common.download(f"{mirror.url}/file", str(tmp_path / "file"))


def test_flickr30k_from_a_mirror(mirror, source, capsys, monkeypatch):
    monkeypatch.chdir(source)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zip:
        for name in CAPTIONS:
            zip.writestr(f"flickr30k-images/{name}", as_bytes(picture(1)))
    mirror.files = {"/flickr30k-images.zip": archive.getvalue(),
                    "/flickr_annotations_30k.csv": write_formats()["nlphuji"].replace("restval", "train").encode()}
    args = ["--url", mirror.url, "--out_dir", source / "out", "--image_size", 16, "--allow_missing", "--workers", 1]
    assert "expected Karpathy's split" in fails(capsys, *args)
    monkeypatch.setattr(pf, "FLICKR30K", {"train": 2, "val": 1})
    mirror.script[:] = ["drop"]
    code, out, err = call(capsys, *args)
    assert code == 0, err
    assert {split: n["images"] for split, n in pf.load_meta(source / "out")["splits"].items()} == pf.FLICKR30K
    n = len(mirror.seen)
    assert call(capsys, *args, "--out_dir", source / "again", "--delete_archive")[0] == 0 and len(mirror.seen) == n  # it had been kept
    assert not os.path.exists("data/flickr30k/flickr30k-images.zip")
    code, out, _ = call(capsys, *args)
    assert code == 0 and "nothing to do" in out and len(mirror.seen) == n  # not downloaded again
    mirror.script[:] = ["404"]
    assert "HTTP 404" in fails(capsys, *args, "--force", "--out_dir", source / "new", code=1)


# ---------------------------------------------------------------------------------------------------------------------
# the user's mistakes


@pytest.mark.parametrize("changed, message", [
    ({"image_sise": 16}, "did you mean --image_size?"),
    ({"image_size": "big"}, "invalid int value"),
    ({"image_size": 0}, "image_size must be from 8 to 4096, not 0"),
    ({"vocab_size": 100}, "vocab_size must be from 257 to 65536, not 100"),
    ({"images": "nowhere"}, "nowhere: no such file"),
    ({"images": None}, "both --images and --captions"),
    ({"images": __file__}, "not a folder, a zip or a whole tar"),
    ({"captions": "nowhere"}, "nowhere: no such file"),
    ({"captions": __file__}, "unknown format"),
    ({"split_files": ["nowhere"]}, "nowhere: no such file"),
    ({"split_files": ["a", "b", "c", "d"]}, "found 4 files"),
    ({"url": "http://x"}, "--url and --delete_archive are for the download"),
    ({"images": None, "captions": None, "url": "ftp://x"}, "expected http:// or https://"),
    ({"tokenizer": "nowhere"}, "--tokenizer nowhere: not bpe, gpt2"),
    ({"tokenizer": "pictures/nowhere"}, "--tokenizer pictures/nowhere: not bpe, gpt2"),
])
def test_mistakes_are_one_line(source, capsys, monkeypatch, changed, message):
    monkeypatch.chdir(source)
    assert message in fails(capsys, *arguments(source, **changed))
    assert not (source / "out" / "meta.json").exists()


def test_out_dir_within_images_and_a_cut_archive(source, capsys):
    assert "lies within" in fails(capsys, *arguments(source, images=source))
    with tarfile.open(source / "whole.tar.gz", "w:gz") as archive:
        archive.add(source / "pictures")
    data = (source / "whole.tar.gz").read_bytes()
    (source / "cut.tar.gz").write_bytes(data[:len(data) // 2])
    assert "a whole tar" in fails(capsys, *arguments(source, images=source / "cut.tar.gz"))


def test_the_command_itself(source):
    command = [sys.executable, pf.__file__, *map(str, arguments(source, images=source / "none"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    code = "import prepare_flickr, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(pf.__file__).parent).returncode == 0


def test_a_folder_that_is_not_prepared(tmp_path):
    with pytest.raises(UserError, match="no prepared data"):
        pf.load_meta(tmp_path / "none")
    pf.write_dataset(tmp_path, {"train": (["a"], [["x y"]], [np.zeros((8, 8, 3), np.uint8)])}, 8)
    with pytest.raises(UserError, match="no split 'val': it has train"):
        pf.read_split(tmp_path, "val")
    (tmp_path / "train_images.bin").write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        pf.read_split(tmp_path, "train")
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        pf.load_meta(tmp_path)
