"""dev/bench.py runs, at tiny sizes."""
import torch

import train
from dev import bench
from helpers import TINY

CPU = torch.device("cpu")


def test_training_and_captioning_are_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "VOCAB_SIZE", 300)
    monkeypatch.setattr(bench, "N_PRODUCTS", 1)
    monkeypatch.setattr(bench, "METHODS", {"beam 3": 3})
    options = train.Options(**TINY, batch_size=4, max_iters=1, local_conv=True, unigram=1.0)
    batches = bench.write_batches(tmp_path, options)
    training = bench.bench_train(options, batches, CPU, with_peer=False, rounds=1)
    assert set(batches) <= set(training)
    for name in batches:
        for dtype in ("float32", "bfloat16"):
            for variant in bench.VARIANTS:
                assert 0 < training[name][f"{variant}, {dtype}"]["fraction_of_matmul"] < 1
            assert training[f"a step of config, {dtype}"]["milliseconds"]["backward"] > 0
    captioning = bench.bench_decode(options, CPU, with_peer=False, rounds=1)
    assert captioning["beam 3, 64 at a time"]["ours, bfloat16"]["images_per_s"] > 0


def test_compared_with_the_faster_dtype_of_a_peer():
    first, second = bench.PEERS
    seconds = {
        ("config", "float32"): 1.0,
        (first, "float32"): 2.0,
        (first, "bfloat16"): 3.0,
        (second, "float32"): 5.0,
        (second, "bfloat16"): 4.0,
    }
    assert list(bench.compare(1.0, seconds).values()) == [2.0, 4.0]
    assert bench.compare(1.0, {("config", "float32"): 1.0}) == {}
