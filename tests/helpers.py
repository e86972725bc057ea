"""
What the tests share. Scripts run in processes of their own, forked from one that has imported
everything already, so that a start takes milliseconds.
"""
import json
import multiprocessing
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from nanocaption.dataset import write_dataset

HERE = Path(__file__).resolve().parents[1]  # the repository
TINY = dict(image_size=16, patch_size=8, n_layer_encoder=1, n_layer_decoder=2, n_head=2, n_embd=32,
            block_size=24)
CONFIG = dict(TINY, batch_size=8, max_iters=8, log_interval=2, eval_interval=4, eval_images=4,
              warmup_iters=2, alpha=0.4, momentum=0.9, crop=0.6, flip=True, jitter=0.2,
              local_conv=True, unigram=0.3, device="cpu", dtype="float32", learning_rate=1e-2)

# macOS cannot fork a process that has used Metal
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
context = multiprocessing.get_context(METHOD)
# the fork server ignores sys.path, and modules that it cannot find
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE / "tests")])
context.set_forkserver_preload(["helpers", "preload"])


def child(script, arguments, folder, file_limit):
    """In the new process: runs the script with files of folder as its input and output."""
    for number, name in enumerate(("input", "output", "errors")):
        file = os.open(folder / name, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    torch.set_num_threads(1)
    # for workers that the script starts
    multiprocessing.set_start_method("fork" if sys.platform == "linux" else "spawn", force=True)
    os.chdir(HERE)
    if file_limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except KeyboardInterrupt:
        # what Python does, and multiprocessing does not
        sys.excepthook(*sys.exc_info())
        sys.exit(128 + signal.SIGINT)


def launch(folder, script, *arguments, input=b"", file_limit=0):
    """
    Starts a script; its output goes to files in folder. file_limit: no file may grow beyond this
    many bytes (0: any). Returns the multiprocessing process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "input").write_bytes(input)
    (folder / "output").write_bytes(b"")
    (folder / "errors").write_bytes(b"")
    arguments = [str(argument) for argument in arguments]
    process = context.Process(target=child, args=(str(script), arguments, folder, file_limit))
    process.start()
    return process


def ended(process, folder, timeout=300):
    """Waits for a launched process; returns its returncode, and stdout and stderr as bytes."""
    process.join(timeout)
    code = process.exitcode
    process.kill()
    assert code is not None, f"still running after {timeout} seconds"
    stdout = (folder / "output").read_bytes()
    stderr = (folder / "errors").read_bytes()
    return SimpleNamespace(returncode=code, stdout=stdout, stderr=stderr)


def run(script, *args, check=True, **kw):
    """Runs a script to its end; with check, it must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        done = ended(launch(Path(folder), script, *args, **kw), Path(folder))
    assert not check or done.returncode == 0, done.stderr.decode()[-3000:]
    return done


def torchrun(*args, check=True):
    """Runs a script on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(arg) for arg in args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=HERE, capture_output=True, timeout=240, env=environment)
    assert not check or done.returncode == 0, done.stderr.decode()[-3000:]
    return done


def one_line_error(done, code, *parts):
    """Asserts that a finished script printed one line on stderr with all these parts."""
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert error.count("\n") == 1 and "Traceback" not in error, error
    for part in parts:
        assert part in error, error


def write_config(path, options):
    """A config file for train.py."""
    lines = [f"{name} = {value!r}\n" for name, value in options.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def start(data, out_dir, *more, options=None, script="train.py", **kw):
    """Runs train.py with CONFIG, changed by options, and with more arguments."""
    config = write_config(out_dir.with_suffix(".py"), {**CONFIG, **(options or {})})
    return run(script, config, f"--data_dir={data}", f"--out_dir={out_dir}", *more, **kw)


def read_log(out_dir):
    """The records of log.jsonl without their times."""
    times = {"seconds", "images_per_s", "captions_per_s"}
    records = []
    for line in (out_dir / "log.jsonl").open():
        record = json.loads(line)
        records.append({name: value for name, value in record.items() if name not in times})
    return records


def random_images(n, size=16, seed=0):
    """uint8 (n, size, size, 3)"""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8))


def tiny_dataset(folder, image_size=20):
    """
    A prepared folder: 20 training images and 6 others, with one to five captions each, of words of
    various lengths, some of them "left".
    """
    rng = random.Random(0)
    words = "a the dog cat child left red ball runs jumps over under blue grassy field".split()

    def sentence():
        return " ".join(rng.choice(words) for _ in range(rng.randint(2, 9)))

    splits = {}
    for split, n in (("train", 20), ("val", 6)):
        names = [f"{split}{i}.jpg" for i in range(n)]
        captions = [[sentence() for _ in range(rng.randint(1, 5))] for _ in range(n)]
        images = random_images(n, image_size, seed=len(split)).numpy()
        splits[split] = names, captions, images
    write_dataset(folder, splits, image_size=image_size, vocab_size=280)
