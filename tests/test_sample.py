"""Tests of sample.py as a command and from Python, and of fine-tuning on one's own photos."""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import HERE, one_line_error, random_images, run, start
from nanocaption.cli import UserError
from nanocaption.dataset import Dataset
from nanocaption.generate import describe_caption
from sample import caption, load

PHOTO = HERE / "assets" / "photos" / "cat.jpg"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def sample(*args, **kw):
    """Runs sample.py in float32."""
    return run("sample.py", "--device=cpu", "--dtype=float32", *args, **kw)


def json_lines(done):
    """What sample.py --json printed."""
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder with a.png and deep/b c.jpg."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "deep").mkdir()
    a, b = random_images(2, 50).numpy()
    Image.fromarray(a).save(folder / "a.png")
    Image.fromarray(b).save(folder / "deep" / "b c.jpg")
    return folder


def readme_captions():
    """README's table of photos: {file name: caption}, from rows of images and the rows below."""
    text = (HERE / "README.md").read_text(encoding="utf-8")
    # without the lines between header and body
    rows = re.findall(r"^\|(.*[^-:| \n].*)\|$", text, re.MULTILINE)
    captions = {}
    for row, below in zip(rows, rows[1:]):
        names = re.findall(r'<img src="assets/photos/(.*?)"', row)
        if names:
            texts = [cell.strip() for cell in below.split("|")]
            captions.update(zip(names, texts, strict=True))
    return captions


def test_the_bundled_checkpoint_captions_photos_as_in_readme():
    expected = readme_captions()
    assert len(expected) >= 8
    lines = json_lines(sample("--json", "--image", HERE / "assets" / "photos"))
    found = {Path(line["image"]).name: line["captions"][0]["text"] for line in lines}
    assert found == expected


def test_captions_have_no_space_before_punctuation():
    tokenizer = SimpleNamespace(decode=lambda ids: " A dog , a .5 cat . ")
    found = describe_caption(SimpleNamespace(tokenizer=tokenizer), [1], -2.0)
    assert found == {"text": "A dog, a .5 cat.", "logprob": -2.0}


def test_loading_the_bundled_checkpoint_imports_no_compiler():
    # torch._dynamo takes longer to import than a caption takes
    code = "import sys; import sample; sample.load(); print('torch._dynamo' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_sample_captions_images_and_names_unreadable_ones(trained, data, photos, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    sheet = tmp_path / "sheet.png"
    done = sample("--image", photos, broken, data, "--out_dir", trained, "--json", "--sheet", sheet,
                  check=False)
    assert done.returncode == 1
    assert b"broken.jpg" in done.stderr
    assert b"Traceback" not in done.stderr
    assert b"1 of 9 images could not be captioned" in done.stderr
    lines = json_lines(done)
    split = Dataset(data).split("val")
    references = dict(zip(split.names, split.captions))
    names = [os.path.basename(line["image"]) for line in lines]
    assert names == ["a.png", "b c.jpg", *split.names]
    for line in lines:
        assert len(line["captions"]) == 1
        assert line["captions"][0]["logprob"] < 0
        assert line["references"] == references.get(line["image"], [])
    assert Image.open(sheet).width > 400


def test_all_readable_images_of_a_folder(trained, tmp_path):
    """Whatever can be decoded is captioned; everything else is counted and named."""
    folder = tmp_path / "photos"
    folder.mkdir()
    image = Image.fromarray(random_images(1, 50)[0].numpy())
    formats = {"a.jpg": "JPEG", "b.jfif": "JPEG", "c.jpe": "JPEG", "d.mpo": "MPO", "e": "JPEG",
               "f.bak": "PNG", "g.PBM": "PPM"}
    for name, format in formats.items():
        image.save(folder / name, format)
    for name in ("h.HEIC", "i"):
        (folder / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (folder / "notes.txt").write_text("Python is not an image")
    (folder / ".hidden").write_text("nor is this")
    done = sample("--image", folder, "--out_dir", trained, "--json", check=False)
    names = [os.path.basename(line["image"]) for line in json_lines(done)]
    assert names == list(formats)
    errors = done.stderr.decode()
    assert f"skipped non-images in {folder}: 1 (notes.txt)\n" in errors
    assert "h.HEIC: not a readable image: HEIC, which Pillow can't decode; convert" in errors
    assert "/i: not a readable image: HEIC" in errors
    assert "2 of 9 images could not be captioned" in errors
    assert done.returncode == 1


def test_an_url_may_be_upper_case(trained):
    done = sample("--image", "HTTP://127.0.0.1:1/a.jpg", "--out_dir", trained, check=False)
    assert b"HTTP://127.0.0.1:1/a.jpg: can't be downloaded" in done.stderr
    assert done.returncode == 1


def test_sample_prints_a_line_for_each_caption_and_reference(trained, data, photos):
    done = sample("--image", photos / "a.png", data, "--limit", "1", "--out_dir", trained)
    lines = done.stdout.decode().splitlines()
    references = Dataset(data).split("val").captions[0]
    assert lines[0].startswith(f"{photos / 'a.png'}: ")
    assert lines[1].startswith("val0.jpg: ")
    assert lines[2:] == [f"    reference: {text}" for text in references]


def test_sample_draws_where_each_word_looked(trained, data, photos, tmp_path):
    where = tmp_path / "new" / "where.png"
    arguments = ["--image", photos, data, "--limit=2", "--out_dir", trained, "--json"]
    done = sample(*arguments, "--attention", where, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == sample(*arguments).stdout
    # a heading and at least one row of tiles for each of four images
    assert Image.open(where).height > 4 * 150


def test_attention_of_pooled_patches_is_refused(data, tmp_path):
    pooled = tmp_path / "pooled"
    start(data, pooled, options=dict(n_query=3, max_iters=1, eval_interval=1))
    where = tmp_path / "where.png"
    done = sample("--image", PHOTO, "--out_dir", pooled, "--attention", where, check=False)
    one_line_error(done, 2, "cannot make attention maps", "n_query=3")
    assert done.stdout == b""
    assert not where.exists()


def test_sample_from_stdin(trained, photos):
    path = photos / "a.png"
    from_file = json_lines(sample("--image", path, "--out_dir", trained, "--json"))
    done = sample("--image", "-", "--out_dir", trained, "--json", input=path.read_bytes())
    assert json_lines(done)[0]["captions"] == from_file[0]["captions"]
    done = sample("--image", "-", "--out_dir", trained, input=b"", check=False)
    assert done.returncode == 1
    assert b"cannot identify image file" in done.stderr
    assert b"BytesIO" not in done.stderr


def test_several_samples(trained, photos):
    done = sample("--image", photos / "a.png", "--out_dir", trained, "--num_samples=3",
                  "--top_p=0.9", "--json")
    assert len(json_lines(done)[0]["captions"]) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_an_error(trained, photos):
    command = [sys.executable, "sample.py", "--image", photos / "a.png", "--out_dir", trained]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, cwd=HERE, stdout=full, stderr=subprocess.PIPE)
    one_line_error(done, 1, "No space left", "free up some space")


def test_caption_from_python(trained, photos):
    a = photos / "a.png"
    b = photos / "deep" / "b c.jpg"
    lines = json_lines(sample("--image", photos, "--out_dir", trained, "--json"))
    texts = [line["captions"][0]["text"] for line in lines]
    captioner = load(trained, "cpu", "float32")
    assert caption(captioner, a) == texts[0]
    assert caption(captioner, [a, b.read_bytes()]) == texts
    assert caption(captioner, []) == []
    with a.open("rb") as file:
        assert caption(captioner, file) == texts[0]
    assert [len(found) for found in caption(captioner, [a, b], num_samples=3)] == [3, 3]
    best = caption(captioner, a, beam=3, n_best=2)
    assert len(set(best)) == 2 and best[0] == caption(captioner, a, beam=3)
    text, words = caption(captioner, a, beam=3, n_best=2, attention=True)
    assert text == best[0] and [word for word, _ in words] == text.split()


def test_caption_of_images_and_arrays_in_memory(trained, tmp_path):
    pixels = random_images(1, 50)[0].numpy()
    gray = Image.fromarray(pixels).convert("L")
    Image.fromarray(pixels).save(tmp_path / "a.png")
    gray.save(tmp_path / "gray.png")
    captioner = load(trained, "cpu", "float32")
    of_file = caption(captioner, tmp_path / "a.png")
    of_gray = caption(captioner, tmp_path / "gray.png")
    clear = np.dstack([pixels, np.full((50, 50), 255, np.uint8)])
    sources = {
        "PIL": (Image.fromarray(pixels), of_file),
        "PIL, a file that is not read yet": (Image.open(tmp_path / "a.png"), of_file),
        "array": (pixels, of_file),
        "array with holes": (np.repeat(pixels, 2, axis=1)[:, ::2], of_file),
        "floats": (pixels / 255, of_file),
        "float32": ((pixels / 255).astype(np.float32), of_file),
        "RGBA": (clear, of_file),
        "gray": (np.asarray(gray), of_gray),
        "gray with a channel": (np.asarray(gray)[:, :, None], of_gray),
        "gray, PIL": (gray, of_gray),
        "several": ([pixels, tmp_path / "gray.png", Image.fromarray(pixels)],
                    [of_file, of_gray, of_file]),
        "an array of several": (np.stack([pixels, pixels]), [of_file, of_file]),
    }
    found = {}
    for name, (source, _) in sources.items():
        try:
            found[name] = caption(captioner, source)
        except Exception as error:
            found[name] = error
    assert found == {name: expected for name, (_, expected) in sources.items()}


def test_a_captioned_image_stays_as_it_was(trained, tmp_path):
    Image.effect_noise((400, 300), 50).save(tmp_path / "large.jpg")
    image = Image.open(tmp_path / "large.jpg")
    try:
        caption(load(trained, "cpu", "float32"), image)
    except UserError as error:
        assert not error
    assert image.size == (400, 300)


@pytest.mark.parametrize("array", [
    np.zeros((3, 50, 50), np.uint8),
    np.full((50, 50, 3), 200.0),
    np.full((50, 50, 3), np.nan),
    np.zeros((50, 50, 3), np.int64),
])
def test_caption_refuses_other_arrays(trained, array):
    try:
        found = caption(load(trained, "cpu", "float32"), array)
    except Exception as error:
        found = str(error)
    assert "expected (H, W), (H, W, 3) or (H, W, 4), of uint8 or of floats from 0 to 1" in found


def test_captions_with_where_each_word_looked(photos):
    paths = [photos / "a.png", HERE / "assets" / "photos" / "cat.jpg"]
    captioner = load(device="cpu", dtype="float32")
    texts = caption(captioner, paths, beam=1)
    found = caption(captioner, paths, beam=1, attention=True)
    assert [text for text, _ in found] == texts
    for text, words in found:
        assert " ".join(word for word, _ in words) == text
        for _, weights in words:
            # 320 pixels at a stride of 32
            assert weights.shape == (10, 10)
            assert weights.min() >= 0
            assert abs(weights.sum() - 1) < 1e-5
    text, words = caption(captioner, paths[1], beam=1, attention=True)
    assert text == texts[1]
    assert len(words) == len(text.split())


def test_caption_refuses_other_files(trained, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    captioner = load(trained, "cpu", "float32")
    with pytest.raises(UserError, match="broken.jpg"):
        caption(captioner, tmp_path / "broken.jpg")


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes(trained, photos, name):
    done = run("sample.py", "--device=cpu", f"--dtype={name}", "--image", photos / "a.png",
               "--out_dir", trained, "--json")
    captioner = load(trained, "cpu", name)
    assert captioner.dtype == DTYPES[name]
    assert captioner.model.wte.weight.dtype == DTYPES[name]
    text = json_lines(done)[0]["captions"][0]["text"]
    assert caption(captioner, photos / "a.png") == text


def test_the_default_dtype_is_one_of_both(trained):
    assert load(trained, "cpu").dtype in DTYPES.values()


def test_fine_tuning_on_own_photos(trained, tmp_path):
    """As README does: the captioner learns new images with a new word and keeps its tokenizer."""
    folder = tmp_path / "photos"
    folder.mkdir()
    lines = ["image,caption"]
    for i in range(60):  # enough that the 5 % for val are not empty
        color = ["red", "blue"][i % 2]
        Image.new("RGB", (30, 20), color).save(folder / f"{i}.png")
        lines.append(f'{i}.png,"my {color} zeppelin"')
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    mine = tmp_path / "mine"
    tuned = tmp_path / "tuned"
    run("prepare_flickr.py", "--images", folder, "--captions", tmp_path / "captions.csv",
        "--out_dir", mine, "--image_size", "16", "--tokenizer", trained)
    start(mine, tuned, f"--init_from={trained}", "--max_iters=150", "--eval_interval=150",
          "--alpha=0")
    images = [folder / "0.png", folder / "1.png"]
    expected = ["my red zeppelin", "my blue zeppelin"]
    assert caption(load(tuned, "cpu", "float32"), images) == expected
    assert caption(load(trained, "cpu", "float32"), images) != expected


@pytest.mark.parametrize("args, parts", [
    ("--beam 2 --num_samples 2", ["--beam", "--num_samples"]),
    ("--beam 0", ["beam", "0"]),
    ("--top_p 1.5", ["top_p", "1.5"]),
    ("--temperature 0", ["temperature"]),
    ("--temperature 0.5", ["--temperature", "--num_samples of at least 2"]),
    ("--min_tokens 9 --max_tokens 5", ["--min_tokens 9 exceeds --max_tokens 5"]),
    ("--bean 3", ["--bean", "--beam"]),
    ("--out_dir /nowhere", ["/nowhere", "checkpoint"]),
    ("--sheet x.doc", ["x.doc", "expected an image file name"]),
    ("--attention x", ["--attention x", "expected an image file name"]),
    ("--attention x.png --num_samples 2", ["--attention", "--num_samples"]),
    ("--dtype float16", ["dtype must be auto, bfloat16 or float32, not 'float16'"]),
    ("--image ftp://x/a.jpg", ["ftp://x/a.jpg", "only http:// and https://"]),
    ("", ["a.jpg", "no such file or folder"]),
])
def test_wrong_sample_options(trained, args, parts):
    args = args.split() or ["--image", "a.jpg"]
    done = run("sample.py", "--image", PHOTO, "--out_dir", trained, *args, check=False)
    one_line_error(done, 2, *parts)


def test_checkpoints_with_code_are_refused(tmp_path):
    torch.save(dict(model=time.sleep), tmp_path / "evil.pt")
    done = run("sample.py", "--image", PHOTO, "--out_dir", tmp_path / "evil.pt", check=False)
    one_line_error(done, 2, "evil.pt")


@pytest.mark.parametrize("option", ["--sheet", "--attention"])
def test_no_input_is_overwritten(trained, tmp_path, option):
    photo = tmp_path / "photo.png"
    Image.fromarray(random_images(1, 20).numpy()[0]).save(photo)
    before = photo.read_bytes()
    for image in (photo, tmp_path):
        done = run("sample.py", "--image", image, "--out_dir", trained, option, photo, check=False)
        one_line_error(done, 2, f"{option} {photo} would overwrite an input file")
    done = run("sample.py", "--image", photo, "--sheet=a.png", "--attention=a.png", check=False)
    one_line_error(done, 2, "need different files")
    assert photo.read_bytes() == before


def test_a_closed_pipe_is_no_error():
    program = "import sys; from nanocaption.cli import run; run(lambda: print('x' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=HERE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
