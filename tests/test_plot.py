"""dev/plot.py: curves from logs that are written out here, and what is drawn."""
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from dev.plot import draw, read_curves, read_log
from helpers import HERE, one_line_error, run

BASELINES = {"human": 0.8, "chance": 0.03, "constant": 0.1}


def step(number, seconds, epoch, loss):
    return {"iter": number, "seconds": seconds, "epoch": epoch, "loss": loss}


def evaluation(number, student, teacher):
    """Each of student and teacher: loss, loss with shuffled images, CIDEr."""
    names = ("loss", "loss_shuffled", "cider")
    scores = dict(student=dict(zip(names, student)), teacher=dict(zip(names, teacher)))
    return {"iter": number, "eval": scores}


FIRST = [
    {"iter": 0, "baselines": BASELINES},
    step(10, 60, 0.5, 4.0),
    evaluation(15, (3.5, 4.5, 0.2), (3.4, 4.4, 0.3)),
    {"iter": 16, "skipped": 1},
    step(20, 120, 1.0, None),
    step(30, 240, 1.5, 3.0),
    evaluation(31, (3.0, 4.2, 0.4), (2.9, 4.1, 0.5)),
]
# self-critical training, which logs minus the reward
SECOND = [step(5, 30, 0.25, -0.7), evaluation(5, (4.0, 6.0, 0.6), (3.9, 5.9, 0.7))]
CURVES = {
    "train": [(1, 4.0), (4, 3.0)],
    "val": [(1.5, 3.5), (4, 3.0), (4.5, 4.0)],
    "val, shuffled images": [(1.5, 4.5), (4, 4.2), (4.5, 6.0)],
    "student": [(1.5, 0.2), (4, 0.4), (4.5, 0.6)],
    "teacher": [(1.5, 0.3), (4, 0.5), (4.5, 0.7)],
}


def write_log(path, records, rest=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + rest)
    return path


def test_stages_are_joined_from_folders_or_one_file(tmp_path):
    first = write_log(tmp_path / "first" / "log.jsonl", FIRST, rest='{"iter": 40, "seco')
    second = write_log(tmp_path / "second" / "log.jsonl", SECOND)
    published = write_log(tmp_path / "published.jsonl", FIRST + SECOND)
    stages = read_log(first.parent) + read_log(second)
    assert stages == [FIRST, SECOND] == read_log(published)
    curves, progress, ends, baselines = read_curves(stages)
    assert curves == CURVES
    assert progress == ([0, 1, 2, 4, 4.5], [0, 0.5, 1, 1.5, 1.75])
    assert ends == [4, 4.5]
    assert baselines == BASELINES
    *_, baselines = read_curves([SECOND])
    assert baselines == {}


@pytest.mark.parametrize("baselines", [BASELINES, {**BASELINES, "human": None}, {}])
def test_two_panels_with_the_lines_of_humans_and_one_caption(tmp_path, monkeypatch, baselines):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    _, progress, ends, _ = read_curves([FIRST, SECOND])
    draw(tmp_path / "curve.png", CURVES, progress, ends, baselines)
    assert Image.open(tmp_path / "curve.png").size == (1328, 544)
    losses, scores, *epochs = drawn[0].axes
    lines = {}
    levels = []
    for panel in (losses, scores):
        for line in panel.lines:
            if line.get_label() in CURVES:
                lines[line.get_label()] = list(map(tuple, line.get_xydata()))
            else:
                levels.append(line.get_ydata()[0])
    assert lines == CURVES
    texts = {0.8: "humans 0.80", 0.1: "one caption for all 0.10"}
    expected = [value for value in texts if value in baselines.values()]
    assert levels == expected
    assert [text.get_text() for text in scores.texts] == [texts[value] for value in expected]
    # an epoch is at the minute at which it was over
    for top in epochs:
        assert [tick.get_text() for tick in top.get_xticklabels()][:1] == ["0"]
        ticks = {text.get_text(): x for text, x in zip(top.get_xticklabels(), top.get_xticks())}
        assert ticks["1"] == pytest.approx(2)


def test_command_on_a_run_and_on_the_bundled_log(trained, tmp_path):
    pytest.importorskip("matplotlib")
    done = run("dev/plot.py", trained, "--output", tmp_path / "run.png")
    assert b"baselines" not in done.stdout
    assert Image.open(tmp_path / "run.png").format == "PNG"
    done = run("dev/plot.py", HERE / "out" / "flickr8k", "--output", tmp_path / "bundled.png")
    has_baselines = "baselines" in (HERE / "out" / "flickr8k" / "log.jsonl").read_text()
    assert has_baselines or b"there are no lines for humans" in done.stdout
    assert (tmp_path / "bundled.png").stat().st_size < 100_000


@pytest.mark.parametrize("text, message", [
    (None, "cannot read"),
    ("no JSON\n", "expected what train.py logs"),
    ("[1]\n", "expected what train.py logs"),
    ("", "has no training steps yet"),
    (json.dumps(FIRST[0]) + "\n", "has no training steps yet"),
])
def test_other_files_are_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    done = run("dev/plot.py", tmp_path, "--output", tmp_path / "curve.png", check=False)
    one_line_error(done, 2, "log.jsonl", message)
    assert not (tmp_path / "curve.png").exists()


def test_only_png_and_only_with_matplotlib(tmp_path):
    log = write_log(tmp_path / "log.jsonl", FIRST)
    done = run("dev/plot.py", log, "--output", tmp_path / "curve.txt", check=False)
    one_line_error(done, 2, "curve.txt: expected a PNG file name")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('none here')")
    done = subprocess.run([sys.executable, HERE / "dev" / "plot.py", log], capture_output=True,
                          cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, timeout=60)
    one_line_error(done, 2, "plots need matplotlib (none here)", "pip install matplotlib")
    assert not (tmp_path / "curve.png").exists()
