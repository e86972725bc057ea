"""dev/bench.py runs, at tiny sizes."""
import re
import sys

import pytest
import torch

import train
from dev import bench
from helpers import HERE, TINY, one_line_error, run

CPU = torch.device("cpu")


def test_training_and_captioning_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "VOCAB_SIZE", 300)
    monkeypatch.setattr(bench, "N_PRODUCTS", 1)
    monkeypatch.setattr(bench, "MATRIX_SIZE", {"cpu": 128})
    monkeypatch.setattr(bench, "RUN_STEPS", 2)
    monkeypatch.setattr(bench, "measured_dtypes", lambda device: ["float32", "bfloat16"])
    monkeypatch.setattr(bench, "METHODS", {"encoder only": 0, "beam 3": 3})
    options = train.Options(**TINY, batch_size=4, max_iters=1, local_conv=True, unigram=1.0)
    batches = bench.write_batches(tmp_path, options)
    tables = bench.bench_train(options, batches, CPU, with_peer=False, rounds=1)
    steps = [tables.pop(f"Training steps, {name}") for name in batches]
    runs, parts = tables.values()
    for dtype in ("float32", "bfloat16"):
        for rows in steps:
            for variant in bench.VARIANTS:
                row = rows[f"{variant}, {dtype}"]
                rate = rows[f"matmul, {dtype}"]["GFLOP/s"]
                assert row["of matmul"] == pytest.approx(row["GFLOP/s"] / rate)
                assert row["of matmul"] > 0
        # its batch is the first one: 4 images with 5 captions each
        row = runs[f"train.py, {dtype}"]
        assert row["captions/s"] == pytest.approx(5 * row["images/s"])
        assert parts["backward"][dtype] > 0
        assert parts["forward: decoder"][dtype] > 0
    captioning = bench.bench_decode(options, CPU, with_peer=False, rounds=1)
    seconds = {}
    for method in bench.METHODS:
        row = captioning["Captioning, 64 at a time"][f"{method}, ours, bfloat16"]
        seconds[method] = row["milliseconds"]
    assert 0 < seconds["encoder only"] < seconds["beam 3"]


def test_compared_with_the_fastest_way_of_each_peer():
    tables = [
        {"matmul, float32": {"GFLOP/s": 9.0},
         "config, float32": {"captions/s": 12.0},
         "peer of 8 tokens, float32": {"captions/s": 2.0},
         "peer of 8 tokens, bfloat16": {"captions/s": 4.0}},
        {"config, float32": {"captions/s": 6.0},
         "peer of 8 tokens, float32": {"captions/s": 3.0},
         "peer of 8 tokens, bfloat16": {"captions/s": 1.0}},
    ]
    bench.compare(tables, "captions/s")
    ratios = {"vs. peer of 8 tokens, float32": 4.0, "vs. peer of 8 tokens, bfloat16": 3.0}
    assert tables[0]["config, float32"] == {"captions/s": 12.0, **ratios}
    halves = {name: ratio / 2 for name, ratio in ratios.items()}
    assert tables[1]["config, float32"] == {"captions/s": 6.0, **halves}
    assert tables[0]["matmul, float32"] == {"GFLOP/s": 9.0}
    assert tables[1]["peer of 8 tokens, float32"] == {"captions/s": 3.0}


def test_a_section_prints_a_markdown_table(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(bench, "run_python", lambda *command: started.append(command[0]))
    monkeypatch.setattr(sys, "argv", ["bench.py", "start", "--rounds=2"])
    bench.main()
    assert started == [HERE / "sample.py", "-c"] * 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:6] == ["", "### From start to caption, bundled checkpoint", "",
                          "|  | seconds | vs. import torch |", "| --- | --- | --- |"]
    assert re.fullmatch(r"\| sample.py \| [\d.]+ \| [\d.]+ \|", lines[6])
    assert re.fullmatch(r"\| import torch \| [\d.]+ \|  \|", lines[7])


@pytest.mark.parametrize("argument", ["--rounds=0", "--confix=a", "train nothing"])
def test_wrong_options(argument):
    words = argument.split()
    wrong = words[-1].split("=")[0].removeprefix("--")
    one_line_error(run("dev/bench.py", *words, check=False), 2, wrong)
