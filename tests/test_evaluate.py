"""Tests of evaluate.py against a tiny captioner, and of dev/meteor_spice.py without Java."""
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from pycocoevalcap.cider.cider import Cider

import evaluate
from checkpoint import VERSION, load
from helpers import HERE, one_line_error, random_images, run, start
from model import Captioner, ModelOptions, pack
from nanocaption.dataset import Dataset, write_dataset
from nanocaption.metrics import tokenize

COLORS = "red blue green black white pink".split()
KEYS = ["images", "cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "distinct", "mean_words",
        "loss", "loss_shuffled", "bits_per_char", "human", "chance", "constant"]
OPTIONS = ModelOptions(image_size=32, patch_size=8, n_layer_encoder=1, n_layer_decoder=1, n_head=2,
                       n_embd=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    A folder: data, six images as a prepared folder; photos and captions.jsonl, the same images as
    files; out, an untrained captioner.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    names = [f"{i}.png" for i in range(6)]
    images = random_images(6, 32).numpy()
    captions = []
    for i, color in enumerate(COLORS):
        captions.append([f"a {color} dog runs .", f"Dog number {i}, it's {color}"])
    splits = {split: (names, captions, images) for split in ("train", "val")}
    write_dataset(folder / "data", splits, image_size=32, vocab_size=300)

    (folder / "photos").mkdir()
    lines = []
    for name, image, texts in zip(names, images, captions):
        Image.fromarray(image).save(folder / "photos" / name)
        lines.append(json.dumps({"image": name, "captions": texts}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    (folder / "empty.json").write_text("[]")

    torch.manual_seed(0)
    data = Dataset(folder / "data")
    model = Captioner(OPTIONS, data.vocab_size)
    checkpoint = dict(
        version=VERSION,
        options=asdict(OPTIONS),
        tokenizer=dict(ranks=data.tokenizer_text, pattern=data.meta["pattern"]),
        model=model.state_dict(),
    )
    (folder / "out").mkdir()
    torch.save(checkpoint, folder / "out" / "best.pt")
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Calls main() in the folder with these arguments; returns what it printed."""
    def call(*args):
        monkeypatch.chdir(folder)
        options = ["--out_dir", "out", "--device", "cpu", "--dtype", "float32"]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, *args])
        evaluate.main()
        return capsys.readouterr()
    return call


def test_scores_of_a_known_captioner(command, folder, monkeypatch):
    """A captioner that gives each image's first reference."""
    references = [texts[0] for texts in Dataset(folder / "data").split("val").captions]
    tokenizer = load(folder / "out", "cpu", "float32").tokenizer
    ids = iter([tokenizer.encode_ordinary(text) for text in references])

    def first_references(model, images, *args, **options):
        return [[(next(ids), 0.0)] for _ in images]

    monkeypatch.setattr(Captioner, "beam_search", first_references)
    printed = command("--data_dir", "data", "--json", "--batch_size", "4", "--save", "save.jsonl",
                      "--sheet", "sheet.png")
    result = json.loads(printed.out)
    assert list(result) == KEYS
    assert result["images"] == 6
    assert result["mean_words"] == 4
    assert result["distinct"] == 1
    for name in ("bleu1", "bleu4", "rouge_l"):
        assert result[name] == pytest.approx(1)
    assert result["cider"] > result["chance"]["cider"]
    assert "CIDEr is unreliable with fewer than 100 images" in printed.err
    saved = (folder / "save.jsonl").read_text().splitlines()
    assert json.loads(saved[1]) == {
        "image": "1.png",
        "caption": "a blue dog runs.",
        "references": ["a blue dog runs .", "Dog number 1, it's blue"],
    }
    # four columns of 200 pixels, as wide as README's text
    assert Image.open(folder / "sheet.png").size[0] == 850


def test_sheet_has_rows_of_best_median_and_worst(monkeypatch):
    drawn = []
    monkeypatch.setattr(evaluate, "draw_sheet", lambda *args, **kw: drawn.append((*args, kw)))
    n = 21
    source = SimpleNamespace(
        references=[[f"reference {i}", "another"] for i in range(n)],
        read_images=lambda index, size: [f"image {i}" for i in index],
    )
    # caption i has the i-th lowest score
    evaluate.draw_extremes("x.png", source, [f"caption {i}" for i in range(n)],
                           [i / 10 for i in range(n)], 32)
    [(path, images, texts, options)] = drawn
    shown = [20, 19, 18, 17, 12, 11, 10, 9, 0, 1, 2, 3]
    assert images == [f"image {i}" for i in shown]
    assert texts[0] == "best 1, CIDEr 2.00\ncaption 20\nreference: reference 20"
    assert texts[8] == "worst 1, CIDEr 0.00\ncaption 0\nreference: reference 0"
    assert [text.split("\n")[1] for text in texts] == [f"caption {i}" for i in shown]
    assert options == {"columns": 4}


def test_a_coco_file_is_scored_like_pycocoevalcap(command, folder, tmp_path, monkeypatch):
    """Photos and annotations laid out like COCO's val2017, some of them captioned correctly."""
    n = 12
    tokenizer = load(folder / "out", "cpu", "float32").tokenizer
    photos = tmp_path / "val2017"
    photos.mkdir()
    texts = []
    for i, image in enumerate(random_images(n, 40).numpy()):
        Image.fromarray(image).save(photos / f"{i:012d}.jpg")
        texts.append([f"A {COLORS[i % 6]} cat sits on table {i}.", f"Cat {i} on a table, asleep"])
    images = [{"id": 7 * i, "file_name": f"{i:012d}.jpg", "height": 40} for i in range(n)]
    annotations = []
    for i in range(n):
        annotations += [{"id": 9 * i, "image_id": 7 * i, "caption": text} for text in texts[i]]
    path = tmp_path / "captions_val2017.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    # every other image gets its own caption, the rest get that of the image before
    written = [texts[i - i % 2][0] for i in range(n)]
    ids = iter([tokenizer.encode_ordinary(text) for text in written])

    def known_captions(model, images, *args, **options):
        return [[(next(ids), 0.0)] for _ in images]

    monkeypatch.setattr(Captioner, "beam_search", known_captions)
    result = json.loads(command("--images", str(photos), "--captions", str(path), "--json").out)
    assert result["images"] == n
    theirs = {i: [" ".join(tokenize(text)) for text in texts[i]] for i in range(n)}
    ours = {i: [" ".join(tokenize(text))] for i, text in enumerate(written)}
    expected, _ = Cider().compute_score(theirs, ours)
    assert 1 < expected < 10
    assert result["cider"] == pytest.approx(expected, rel=1e-6)


def flickr_data(folder, train, val):
    """A prepared folder whose images have these names."""
    splits = {}
    for split, names in (("train", train), ("val", val)):
        captions = [[f"a {COLORS[i % 6]} dog runs", "a dog"] for i in range(len(names))]
        splits[split] = names, captions, random_images(len(names), 20).numpy()
    # single bytes, so that both folders have the same tokenizer
    write_dataset(folder, splits, image_size=20, vocab_size=257)


def test_training_images_among_the_scored_ones_are_counted(tmp_path):
    """By their Flickr ids, which Flickr8k and Flickr30k share; fine-tuning keeps the parent's."""
    first = ["1000268201_693b08cb0e.jpg", "36979.jpg", "23445819_3a458716c1.jpg", "7.jpg"]
    second = ["photos/987654321_a.jpg", "left.jpg", "000000391895.jpg"]
    scored = ["1000268201.jpg", "987654321.jpg", "36979_x.png", "369790.jpg", "7.jpg",
              "000000391895.jpg", "x1000268201.jpg"]
    flickr_data(tmp_path / "8k", first, ["1.jpg", "2.jpg"])
    flickr_data(tmp_path / "other", second, scored)
    options = dict(eval_images=2, batch_size=2, max_iters=1, eval_interval=1)
    start(tmp_path / "8k", tmp_path / "parent", options=options)
    start(tmp_path / "other", tmp_path / "tuned", f"--init_from={tmp_path / 'parent'}",
          options=options)
    for out, n_known, n_seen in (("parent", 3, 2), ("tuned", 4, 3)):
        checkpoint = torch.load(tmp_path / out / "best.pt", weights_only=True)
        ids = checkpoint.get("flickr_ids", torch.zeros(0))
        assert (len(ids), ids.dtype) == (n_known, torch.int64)
        done = run("evaluate.py", "--out_dir", tmp_path / out, "--data_dir", tmp_path / "other")
        warning = f"{n_seen} of these 7 images have the Flickr ids of training images"
        assert warning in done.stderr.decode()
    # older checkpoints have none
    del checkpoint["flickr_ids"]
    torch.save(checkpoint, tmp_path / "old.pt")
    done = run("evaluate.py", "--out_dir", tmp_path / "old.pt", "--data_dir", tmp_path / "other")
    assert "Flickr" not in done.stderr.decode()


def test_loss_is_that_of_each_caption_alone(command, folder):
    captioner = load(folder / "out", "cpu", "float32")
    model = captioner.model
    split = Dataset(folder / "data").split("val")
    logprob = 0.0
    n_tokens = 0
    n_characters = 0
    for image, texts in zip(split.read_images(range(6)), split.captions):
        encoded = model.encode(torch.from_numpy(image[None]))
        for text in texts:
            words = captioner.tokenizer.encode_ordinary(text)
            n = len(words) + 1
            captions = dict(
                tokens=torch.tensor([[model.eot_token, *words]]),
                position=torch.arange(n)[None],
                segment=torch.ones(1, n, dtype=torch.long),
            )
            logits = model.decode(encoded, captions)[0] @ model.wte.weight.T
            logp = logits.log_softmax(-1)
            logprob += logp[range(n), [*words, model.eot_token]].sum().item()
            n_tokens += n
            n_characters += len(text)
    result = json.loads(command("--data_dir", "data", "--json", "--max_tokens", "5").out)
    assert result["loss"] == pytest.approx(-logprob / n_tokens, rel=1e-5)
    assert result["bits_per_char"] == pytest.approx(-logprob / math.log(2) / n_characters, rel=1e-5)


def test_a_captioner_that_ignores_its_images_is_reported(command, folder):
    """A captioner that overfits the six images, and the same with its encoder's output zeroed."""
    model = load(folder / "out", "cpu", "float32").model
    split = Dataset(folder / "data").split("val")
    images = torch.from_numpy(split.read_images(range(6)))
    captions = pack(split.read_tokens(range(6)), model.eot_token, model.max_tokens)
    n_tokens = (captions["targets"] >= 0).sum().item()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        loss, _ = model(images, captions)
        (loss / n_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint = torch.load(folder / "out" / "best.pt", weights_only=True)
    checkpoint["model"] = model.state_dict()
    torch.save(checkpoint, folder / "overfitted.pt")
    for name in ("encoder.norm.weight", "encoder.norm.bias"):
        checkpoint["model"][name] = torch.zeros_like(checkpoint["model"][name])
    torch.save(checkpoint, folder / "blind.pt")

    options = ["--data_dir", "data", "--json", "--batch_size", "4"]
    printed = command(*options, "--out_dir", "overfitted.pt")
    result = json.loads(printed.out)
    assert result["loss_shuffled"] > result["loss"] + 0.1
    assert result["distinct"] > 0.5
    assert "barely uses" not in printed.err
    # each image's captions with the next image
    expected = model.cross_entropy(model.encode(images.roll(-1, 0)), captions).item() / n_tokens
    assert result["loss_shuffled"] == pytest.approx(expected, rel=1e-5)

    printed = command(*options, "--out_dir", "blind.pt")
    result = json.loads(printed.out)
    assert result["loss_shuffled"] == pytest.approx(result["loss"], rel=1e-5)
    assert result["distinct"] == pytest.approx(1 / 6)
    assert "the model barely uses its images" in printed.err


def test_files_score_as_the_prepared_split(command):
    options = ["--json", "--max_tokens", "5", "--beam", "2"]
    files = command("--images", "photos", "--captions", "captions.jsonl", *options)
    prepared = command("--data_dir", "data", *options)
    assert json.loads(files.out) == json.loads(prepared.out)


def test_table(command):
    printed = command("--data_dir", "data", "--limit", "3", "--max_tokens", "5")
    lines = printed.out.splitlines()
    assert lines[0].split()[:3] == ["3", "images", "CIDEr"]
    titles = [line[:26].strip() for line in lines[1:5]]
    assert titles == ["model", "humans*", "another image's caption", "one caption for all"]
    for line in lines[1:5]:
        assert len(line[26:].split()) == 8
    assert lines[5].startswith("loss ")


def test_references_longer_than_the_model_allows_are_reported(command, folder):
    captions = ["a dog runs " * 60, "a cat sits " * 60, "a dog", "", " "]
    (folder / "long.jsonl").write_text(json.dumps({"image": "0.png", "captions": captions}))
    printed = command("--images", "photos", "--captions", "long.jsonl", "--json")
    assert json.loads(printed.out)["images"] == 1
    assert "ignored 2 empty captions in long.jsonl" in printed.err
    assert "2 references were cut to 64 tokens" in printed.err


def test_bfloat16_scores_almost_as_float32(command, folder):
    results = {}
    for dtype in ("float32", "bfloat16"):
        printed = command("--data_dir", "data", "--json", "--max_tokens", "5", "--dtype", dtype)
        results[dtype] = json.loads(printed.out)
    assert results["bfloat16"]["loss"] != results["float32"]["loss"]
    assert results["bfloat16"]["loss"] == pytest.approx(results["float32"]["loss"], rel=0.01)


@pytest.mark.parametrize("args, message", [
    ("--spilt val", "did you mean --split?"),
    ("--beam 0", "beam must be between 1 and 10000, not 0"),
    ("--length_penalty nan", "length_penalty must be between 0 and 100, not nan"),
    ("--dtype float16", "dtype must be auto, bfloat16 or float32, not 'float16'"),
    ("--images FOLDER/photos", "use both --images and --captions"),
    ("--data_dir nowhere", "nowhere: not a prepared folder"),
    ("--data_dir FOLDER/data --split dev", "no split 'dev'; it has train, val"),
    ("--sheet sheet.txt", "--sheet sheet.txt: expected an image file name"),
    ("--save nowhere/x.jsonl", "no folder nowhere; create it first"),
    ("--images FOLDER/photos --captions FOLDER/captions.jsonl --split val",
     "has no captions of split 'val'; it has no splits"),
    ("--images FOLDER/photos --captions FOLDER/captions.jsonl --save FOLDER/captions.jsonl",
     "captions.jsonl would overwrite an input file"),
    ("--images FOLDER/photos --captions FOLDER/captions.jsonl --sheet FOLDER/photos/0.png",
     "0.png would overwrite an input file"),
    ("--images FOLDER/photos --captions FOLDER/empty.json", "empty.json has no captions"),
    ("--images FOLDER/out --captions FOLDER/captions.jsonl", "0.png, named in "),
])
def test_mistakes_are_one_line(folder, args, message):
    args = args.replace("FOLDER", str(folder)).split()
    if "--data_dir" not in args:
        args += ["--data_dir", folder / "data"]
    done = run("evaluate.py", "--out_dir", folder / "out", *args, check=False)
    one_line_error(done, 2, message)
    assert not done.stdout


# -----------------------------------------------------------------------------
# dev/meteor_spice.py

FAKE = {  # pycocoevalcap without its Java programs
    "__init__.py": "",
    "meteor/meteor.py": """
class Meteor:
    def compute_score(self, references, captions):
        same = [captions[i][0] in references[i] for i in captions]
        return sum(same) / len(same), same
""",
    "spice/spice.py": """
class Spice:
    def compute_score(self, references, captions):
        raise OSError("no models")
""",
}


@pytest.fixture
def meteor_spice(tmp_path):
    """Runs dev/meteor_spice.py with a fake pycocoevalcap and nothing on the PATH but java."""
    for name, text in FAKE.items():
        path = tmp_path / "pycocoevalcap" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    java = tmp_path / "java"
    java.write_text("")
    java.chmod(0o755)

    def call(*args):
        command = [sys.executable, HERE / "dev" / "meteor_spice.py", *args]
        environment = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True,
                              timeout=60)
    return call


def test_meteor_spice_reads_what_evaluate_saves(command, folder, meteor_spice, tmp_path):
    command("--data_dir", "data", "--max_tokens", "5", "--save", "untrained.jsonl")
    done = meteor_spice(folder / "untrained.jsonl")
    assert done.returncode == 0, done.stderr
    records = [
        {"image": "0.png", "caption": "A dog, it's red.", "references": ["x", "a dog it's red"]},
        {"image": "1.png", "caption": "a dog", "references": ["a cat"]},
    ]
    saved = tmp_path / "saved.jsonl"
    saved.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = meteor_spice(saved)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines == ["METEOR 0.500", "SPICE failed (no models)"]


def test_meteor_spice_survives_a_broken_java(meteor_spice, tmp_path):
    """As in pycocoevalcap, a Meteor that fails keeps its lock and later waits for it."""
    (tmp_path / "pycocoevalcap" / "meteor" / "meteor.py").write_text("""
import threading
class Meteor:
    def __init__(self):
        self.lock = threading.Lock()
    def compute_score(self, references, captions):
        self.lock.acquire()
        raise ValueError("no score")
    def __del__(self):
        self.lock.acquire()
""")
    record = {"image": "0.png", "caption": "a dog", "references": ["a dog"]}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    done = meteor_spice("x.jsonl")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    assert lines == ["METEOR failed (no score)", "SPICE failed (no models)"]


def test_meteor_spice_without_java(meteor_spice, tmp_path):
    (tmp_path / "java").unlink()
    one_line_error(meteor_spice("x.jsonl"), 2, "Java is missing: there is no java on the PATH")


def test_meteor_spice_without_pycocoevalcap(meteor_spice, tmp_path):
    (tmp_path / "pycocoevalcap" / "meteor" / "meteor.py").unlink()
    one_line_error(meteor_spice("x.jsonl"), 2, "pip install pycocoevalcap")


@pytest.mark.parametrize("text", [None, "", "no JSON", "[]", "{}"])
def test_meteor_spice_refuses_other_files(meteor_spice, tmp_path, text):
    if text is not None:
        (tmp_path / "x.jsonl").write_text(text)
    one_line_error(meteor_spice("x.jsonl"), 2, "x.jsonl", "expected what evaluate.py --save writes")
