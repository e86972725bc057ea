"""
What the tests share: our scripts in processes of their own, forked from one that has imported everything, so that a start
takes milliseconds and not seconds.
"""
import multiprocessing
import os
import random
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch._dynamo  # noqa: F401: optimizers load it, a second each time

import bench  # noqa: F401: with it, all of ours
from prepare_flickr import write_dataset

HERE = Path(__file__).resolve().parent
context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")  # macOS can't fork what has used Metal
context.set_forkserver_preload(["conftest"])


def child(script, arguments, folder, file_limit):
    """In the new process: the script as `python script arguments` would run it, with folder's files for its input and output."""
    for number, name in enumerate(("input", "output", "errors")):
        file = os.open(folder / name, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # by lines
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)  # for workers of its own
    os.chdir(HERE)
    if file_limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except KeyboardInterrupt:  # what Python would do, and multiprocessing doesn't
        sys.excepthook(*sys.exc_info())


def launch(folder, script, *arguments, input=b"", file_limit=0):
    """
    Begins a script of ours; its output goes to files in folder. file_limit: bytes, no larger file can be written (0: any).
    Returns the process (multiprocessing's).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in dict(input=input, output=b"", errors=b"").items():
        (folder / name).write_bytes(data)
    process = context.Process(target=child, args=(str(script), [*map(str, arguments)], folder, file_limit))
    process.start()
    return process


def ended(process, folder, timeout=300):
    """Waits for it -> returncode (minus the signal that killed it), stdout and stderr, both bytes."""
    process.join(timeout)
    code = process.exitcode
    process.kill()
    assert code is not None, f"still running after {timeout} seconds"
    return SimpleNamespace(returncode=code, stdout=(folder / "output").read_bytes(), stderr=(folder / "errors").read_bytes())


def tiny_dataset(folder):
    """A prepared folder: 20 pictures of 20 × 20 to train on and 6 others, with one to five captions each, in words of various lengths."""
    rng, words = random.Random(0), "a the dog cat child left red ball runs jumps over under blue grassy field".split()
    sentence = lambda: " ".join(rng.choice(words) for _ in range(rng.randint(2, 9)))
    splits = {split: ([f"{split}{i}.jpg" for i in range(n)], [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(n)],
                      np.random.default_rng(len(split)).integers(0, 256, (n, 20, 20, 3), np.uint8)) for split, n in (("train", 20), ("val", 6))}
    write_dataset(folder, splits, image_size=20, vocab_size=280)
