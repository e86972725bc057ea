"""
Fault injection: breaks things on purpose; nothing may be lost and every error must be reported.

    python -m pytest tests/test_faults.py                # each fault a few times
    python tests/test_faults.py --minutes 30 --seed 1    # as often as time allows; prints a table

Each fault is a generator that yields once per try: "" if the program survived, otherwise what was
lost.
"""
import collections
import contextlib
import dataclasses
import http.server
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import checkpoint
import evaluate
import prepare_flickr
import sample
import train
from dev import bench
from helpers import HERE, TINY, ended, launch, tiny_dataset, write_config
from hostile import (ARCHIVES, captioned_names, caption_files, hostile_images, image_bytes, mangle,
                     write_archive)
from nanocaption import cli, download
from nanocaption.captions import read_captions
from nanocaption.cli import UserError
from nanocaption.images import load_image

resource = pytest.importorskip("resource", reason="these tests need the limits of POSIX")

FAULTS = {}  # name: (generator, tries in the quick form, weight of its time in the long form)
SMALL = dict(TINY, n_layer_decoder=1, n_embd=16, batch_size=8, crop=0.8, dropout=0.1,
             optimizer="muon", log_interval=1, eval_interval=3, eval_images=4, warmup_iters=2,
             device="cpu", dtype="float32")
STEPS = 25  # of the runs that are interrupted


def fault(name, quick, weight):
    """Registers a generator function(folder, rng) in FAULTS."""
    def register(function):
        FAULTS[name] = (function, quick, weight)
        return function
    return register


# -----------------------------------------------------------------------------
# running scripts

def finish(folder, script, *arguments, **options):
    """Runs a script to its end; returns its exit code and what it printed on stderr."""
    done = ended(launch(folder / "io", script, *arguments, **options), folder / "io")
    return done.returncode, done.stderr.decode(errors="replace")


def succeed(folder, script, *arguments):
    """Runs a script that must not fail, before anything is broken."""
    code, errors = finish(folder, script, *arguments)
    assert code == 0, errors


def printed(folder):
    """What the script that was launched last has printed on stdout and stderr."""
    output = (folder / "io/output").read_text(errors="replace")
    return output + (folder / "io/errors").read_text(errors="replace")


def check_error(code, errors, expected, *parts):
    """Returns "" if a script ended with this code and one line on stderr that has all parts."""
    lines = [line for line in errors.splitlines() if "seconds left" not in line]  # no progress
    if code == expected and len(lines) == 1 and "Traceback" not in errors:
        if all(part in lines[0] for part in parts):
            return ""
    return f"exit code {code}, expected {expected} and {parts}: {errors[-300:]!r}"


def check_success(code, errors):
    """Returns "" if a script succeeded."""
    return "" if code == 0 else f"exit code {code}: {errors[-300:]}"


# -----------------------------------------------------------------------------
# training

def prepare_training(folder):
    """A tiny dataset and a config."""
    tiny_dataset(folder / "data")
    write_config(folder / "config.py", SMALL)


def train_arguments(folder, name, steps=STEPS):
    """The arguments of train.py that start or resume a run in folder/name."""
    return [folder / "config.py", f"--data_dir={folder}/data", f"--out_dir={folder}/{name}",
            f"--max_iters={steps}", "--init_from=resume"]


def run_state(out_dir):
    """Everything that a run has made, except for times, as values to compare with ==."""
    found = {}
    for name in ("last.pt", "best.pt"):
        saved = torch.load(out_dir / name, weights_only=True)
        del saved["options"]["out_dir"]
        if "state" in saved:
            del saved["state"]["seconds"]
            del saved["state"]["sums"][-1]
        for key, value in saved.items():
            found[f"{name}: {key}"] = comparable(value)
    times = {"seconds", "images_per_s", "captions_per_s"}
    log = []
    for line in (out_dir / "log.jsonl").open():
        record = json.loads(line)
        log.append({key: value for key, value in record.items() if key not in times})
    found["log.jsonl"] = log
    return found


def comparable(value):
    """Tensors as bytes, so that == compares bit by bit, in nested dicts and lists."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [comparable(item) for item in value]
    return value


def check_same_run(out_dir, expected):
    """Returns "" if the run in out_dir has made the same as another, run_state's dict."""
    found = run_state(out_dir)
    different = [name for name in found if found[name] != expected.get(name)]
    return f"differs from an undisturbed run: {', '.join(different)}" if different else ""


def check_loadable(out_dir):
    """Returns "" if all checkpoints in a folder can be loaded."""
    for path in (out_dir / "last.pt", out_dir / "best.pt"):
        if path.exists():
            try:
                checkpoint.build(torch.load(path, weights_only=True))
            except Exception as error:
                return f"{path.name} can't be loaded: {error}"
    return ""


def interrupt_runs(interrupt, folder, rng):
    """
    Starts runs and calls interrupt(process, out_dir) at a random time, again and again until they
    are finished. interrupt returns what was lost, or "".
    """
    prepare_training(folder)
    start = time.monotonic()
    succeed(folder, "train.py", *train_arguments(folder, "whole"))
    seconds = time.monotonic() - start
    whole = run_state(folder / "whole")
    for number in itertools.count():
        out_dir = folder / f"broken{number}"
        had_checkpoint = False
        finished = False
        lost = ""
        while not finished and not lost:
            process = launch(folder / "io", "train.py", *train_arguments(folder, out_dir.name))
            process.join(rng.uniform(0, seconds))
            finished = process.exitcode is not None
            if finished:
                lost = check_success(process.exitcode, printed(folder))
            else:
                lost = interrupt(process, out_dir)
            has_checkpoint = (out_dir / "last.pt").exists()
            lost = lost or check_loadable(out_dir)
            if had_checkpoint and not has_checkpoint:
                lost = lost or "last.pt is gone"
            if finished:
                lost = lost or check_same_run(out_dir, whole)
            had_checkpoint = has_checkpoint
            yield lost


@fault("training, killed (SIGKILL)", quick=5, weight=6)
def training_killed(folder, rng):
    def kill(process, out_dir):
        process.kill()
        process.join()
        return ""

    yield from interrupt_runs(kill, folder, rng)


@fault("training, told to stop (SIGTERM, SIGINT, SIGINT twice)", quick=3, weight=3)
def training_stopped(folder, rng):
    def stop(process, out_dir):
        signals = rng.choice([
            [signal.SIGTERM],
            [signal.SIGINT],
            [signal.SIGINT, signal.SIGINT],
        ])
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            time.sleep(0.01)
        process.join(60)
        code = process.exitcode
        process.kill()
        return check_stopped(code, printed(folder), signals, out_dir)

    yield from interrupt_runs(stop, folder, rng)


def check_stopped(code, output, signals, out_dir):
    """Returns "" if a run did after these signals what it should."""
    number = signals[0]
    saved = -1
    if (out_dir / "last.pt").exists():
        saved = torch.load(out_dir / "last.pt", weights_only=True)["state"]["step"]
    if re.search(r"cli\.py.*, in run$", output, re.M):
        return f"a traceback: {output[-300:]}"
    if code == 0:
        # the run finished just then
        return "" if saved == STEPS else f"exit code 0 at step {saved}"
    if "\nstep " not in output:
        # before cli.run takes over, Python's own exit codes are fine
        by_python = code in (1, -number) and "train.py: " not in output
        return "" if by_python or code == 128 + number else f"exit code {code}: {output[-300:]}"
    if code == 130 and len(signals) == 2:
        # left without saving
        return "a half-written file is left" if any(out_dir.glob("*.tmp*")) else ""
    stopped = re.search(r"stopped at step (\d+)", output)
    if code == 128 + number and stopped and int(stopped[1]) == saved:
        return ""
    return f"exit code {code}, saved step {saved}: {output[-200:]}"


@fault("training, disk full", quick=2, weight=1)
def training_disk_full(folder, rng):
    prepare_training(folder)
    succeed(folder, "train.py", *train_arguments(folder, "whole", 12))
    whole = run_state(folder / "whole")
    size = (folder / "whole/last.pt").stat().st_size
    for number in itertools.count():
        out_dir = folder / f"full{number}"
        arguments = train_arguments(folder, out_dir.name, 12)
        # every second try has an earlier checkpoint, which must survive
        has_checkpoint = number % 2 == 1
        if has_checkpoint:
            finish(folder, "train.py", *train_arguments(folder, out_dir.name, rng.randint(3, 9)))
        limit = rng.randint(100, size - 1)
        code, errors = finish(folder, "train.py", *arguments, file_limit=limit)
        lost = check_error(code, errors, 1, "free up some space") or check_loadable(out_dir)
        if has_checkpoint and not (out_dir / "last.pt").exists():
            lost = lost or "last.pt is gone"
        if not lost:
            lost = check_success(*finish(folder, "train.py", *arguments))
        if not has_checkpoint:
            lost = lost or check_same_run(out_dir, whole)
        yield lost


@fault("one of two ranks killed", quick=0, weight=2)
def rank_killed(folder, rng):
    prepare_training(folder)
    if start_pair(folder, "whole").wait(300):
        raise RuntimeError((folder / "output").read_text())
    whole = run_state(folder / "whole")
    for number in itertools.count():
        out_dir = folder / f"pair{number}"
        process = start_pair(folder, out_dir.name)
        while not (out_dir / "last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.random())
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        ranks = children.stdout.split()
        if process.poll() is not None or not ranks:
            continue  # it has finished already
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        try:
            lost = "" if process.wait(60) else "exit code 0"
        except subprocess.TimeoutExpired:
            lost = "the other rank was still running after a minute"
            process.kill()
        if not lost and start_pair(folder, out_dir.name).wait(300):
            lost = f"did not resume: {(folder / 'output').read_text()[-300:]}"
        yield lost or check_same_run(out_dir, whole) or check_loadable(out_dir)


def start_pair(folder, name):
    """Starts train.py on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(HERE / "train.py"), *map(str, train_arguments(folder, name, 60))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = open(folder / "output", "w")
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


@fault("long run: memory, open files, disk (2,000 steps each)", quick=0, weight=2)
def long_run(folder, rng):
    if not os.path.exists("/proc"):
        return
    prepare_training(folder)
    steps = 10_000
    process = launch(folder / "io", "train.py", *train_arguments(folder, "long", steps),
                     "--eval_interval=20", "--log_interval=100")
    try:
        first = None
        for goal in range(2000, steps, 2000):
            while last_step(folder / "long/log.jsonl") < goal and process.exitcode is None:
                time.sleep(0.05)
            now = resources(process.pid, folder / "long")
            first = first or now
            grew = (now["memory"] > first["memory"] * 1.05 + 2 or now["files"] > first["files"] + 1
                    or now["disk"] > first["disk"] * 1.01)
            yield f"{first} grew to {now}" if grew else ""
        process.join()
        yield check_success(process.exitcode, printed(folder))
    finally:
        process.kill()


def last_step(log):
    """The step of the last complete line of log.jsonl; 0 if there is none."""
    if not log.exists():
        return 0
    lines = log.read_text().split("\n")[:-1]
    return json.loads(lines[-1])["iter"] if lines else 0


def resources(pid, out_dir):
    """MB of memory and the number of open files of a process; bytes of its checkpoints."""
    counts = []
    for _ in range(5):
        # files that are open only for a moment are not there all five times
        counts.append(len(os.listdir(f"/proc/{pid}/fd")))
        time.sleep(0.03)
    disk = sum(path.stat().st_size for path in out_dir.glob("*.pt"))
    return dict(memory=bench.anonymous_memory(pid), files=min(counts), disk=disk)


# -----------------------------------------------------------------------------
# preparing

def write_photos(folder, n=30):
    """A folder of photos and a caption file."""
    (folder / "photos").mkdir()
    lines = []
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((400, 300)).save(folder / f"photos/p{i}.jpg")
        lines += [f"p{i}.jpg#{k}\ta dog number {i} runs {k} times\n" for k in range(3)]
    (folder / "captions.token").write_text("".join(lines))


def prepare_arguments(folder, name):
    """The arguments of prepare_flickr.py that write folder/name."""
    return ["--images", folder / "photos", "--captions", folder / "captions.token",
            "--out_dir", folder / name, "--workers", 2, "--vocab_size", 300, "--image_size", 64]


def contents(folder):
    """{file name: bytes}"""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def check_contents(folder, expected):
    """Returns "" if a folder has exactly these contents."""
    found = contents(folder)
    if found == expected:
        return ""
    names = [name for name in found | expected if found.get(name) != expected.get(name)]
    return f"differs: {', '.join(names)}"


@fault("preparing, killed (SIGKILL)", quick=2, weight=2)
def preparing_killed(folder, rng):
    write_photos(folder)
    start = time.monotonic()
    succeed(folder, "prepare_flickr.py", *prepare_arguments(folder, "whole"))
    seconds = time.monotonic() - start
    whole = contents(folder / "whole")
    for number in itertools.count():
        arguments = prepare_arguments(folder, f"killed{number}")
        process = launch(folder / "io", "prepare_flickr.py", *arguments)
        process.join(rng.uniform(0, seconds))
        process.kill()
        process.join()
        for _ in range(100):
            code, errors = finish(folder, "prepare_flickr.py", *arguments)
            if "another process" not in errors:
                break
            # workers need a moment to notice that their parent is gone
            time.sleep(0.05)
        lost = check_success(code, errors)
        yield lost or check_contents(folder / f"killed{number}", whole)


@fault("preparing, disk full", quick=2, weight=1)
def preparing_disk_full(folder, rng):
    write_photos(folder)
    succeed(folder, "prepare_flickr.py", *prepare_arguments(folder, "whole"))
    whole = contents(folder / "whole")
    largest = max(len(data) for data in whole.values())
    for number in itertools.count():
        arguments = prepare_arguments(folder, f"full{number}")
        limit = rng.randint(1, largest - 1)
        code, errors = finish(folder, "prepare_flickr.py", *arguments, file_limit=limit)
        lost = check_error(code, errors, 1, "free up some space")
        if (folder / f"full{number}/meta.json").exists():
            lost = lost or "meta.json is there"
        lost = lost or check_success(*finish(folder, "prepare_flickr.py", *arguments))
        yield lost or check_contents(folder / f"full{number}", whole)


@fault("two processes in one folder: preparing, training", quick=3, weight=1)
def two_in_one_folder(folder, rng):
    write_photos(folder)
    prepare_training(folder)
    (folder / "two").mkdir()
    with cli.lock_folder(folder / "two"):
        code, errors = finish(folder, "prepare_flickr.py", *prepare_arguments(folder, "two"))
        yield check_error(code, errors, 2, "another process")
        code, errors = finish(folder, "train.py", *train_arguments(folder, "two", 1))
        yield check_error(code, errors, 2, "another process")
    succeed(folder, "prepare_flickr.py", *prepare_arguments(folder, "whole"))
    whole = contents(folder / "whole")
    for number in itertools.count():
        arguments = prepare_arguments(folder, f"two{number}")
        first = launch(folder / "io", "prepare_flickr.py", *arguments)
        second = launch(folder / "io2", "prepare_flickr.py", *arguments)
        codes = [ended(first, folder / "io").returncode, ended(second, folder / "io2").returncode]
        lost = ""
        if sorted(codes) not in ([0, 0], [0, 2]):
            lost = f"exit codes {codes}"
        yield lost or check_contents(folder / f"two{number}", whole)


# -----------------------------------------------------------------------------
# downloads

class Handler(http.server.BaseHTTPRequestHandler):
    """A web server that does what the path says, see IMAGE_URLS."""
    image = image_bytes(Image.new("RGB", (60, 40), "red"), "JPEG")
    redirects = {"loop": "/loop", "elsewhere": "ftp://example.org/x.jpg", "nonsense": "http://["}

    def do_GET(self):
        what = self.path.strip("/")
        if what in self.redirects:
            self.send_response(302)
            self.send_header("Location", self.redirects[what])
            self.end_headers()
            return
        is_image = what in ("image", "slow", "short")
        body = self.image if is_image else b"<html>not an image</html>"
        self.send_response(404 if what == "404" else 200)
        if what == "short":
            self.send_header("Content-Length", str(len(body) + 10))
        elif what != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.send_body(what, body)

    def send_body(self, what, body):
        while what == "endless":
            self.wfile.write(bytes(2**16))
        if what == "slow":
            for byte in body:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.05)
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def web_server(handler):
    """Serves in a thread; yields the URL."""
    os.environ["no_proxy"] = "127.0.0.1"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


IMAGE_URLS = {  # URL, or path on our server: part of the error message ("": an image)
    "image": "",
    "slow": "timed out after 1 s",
    "endless": "more than 1 MB",
    "loop": "too many redirects",
    "nonsense": "can't be downloaded",
    "elsewhere": "can't be downloaded",
    "page": "not a readable image",
    "404": "404",
    "short": "can't be downloaded",
    "http://127.0.0.1:9/x.jpg": "can't be downloaded",
    "ftp://127.0.0.1/x.jpg": "only http",
}


@fault("images at URLs", quick=11, weight=0.2)
def image_urls(folder, rng):
    with (mock.patch.object(download, "IMAGE_BYTES", 2**20),
          mock.patch.object(download, "IMAGE_SECONDS", 1),
          web_server(Handler) as server):
        for path, message in itertools.cycle(IMAGE_URLS.items()):
            url = path if "://" in path else f"{server}/{path}"
            try:
                [(_, source, _)] = sample.find_images([url], "val", None)
                image = load_image(source, 16)
                is_red = abs(image.astype(int) - [254, 0, 0]).max() < 3
                lost = "" if is_red and not message else f"{url}: was taken"
            except UserError as error:
                lost = check_message(error, message or "no error", url)
            yield lost


def check_message(error, *parts):
    """Returns "" if an error's message is one line and has all parts."""
    message = str(error)
    if "\n" not in message and all(part in message for part in parts):
        return ""
    return f"expected {parts}: {message}"


@fault("downloading, disk full", quick=1, weight=0.2)
def download_disk_full(folder, rng):
    body = rng.randbytes(300_000)

    class FileHandler(Handler):
        """Serves body, also in part."""

        def do_GET(self):
            first = int(re.sub(r"\D", "", self.headers.get("Range", "0")) or 0)
            self.send_response(206 if first else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(body) - first))
            if first:
                content_range = f"bytes {first}-{len(body) - 1}/{len(body)}"
                self.send_header("Content-Range", content_range)
            self.end_headers()
            self.wfile.write(body[first:])

    script = folder / "fetch.py"
    script.write_text(
        "import sys\n"
        "from nanocaption import cli, download\n"
        "download.WAIT = 0.01\n"
        "cli.run(lambda: download.download(*sys.argv[1:]))\n")
    with web_server(FileHandler) as url:
        for number in itertools.count():
            path = folder / f"file{number}"
            limit = rng.randint(1000, len(body) - 1)
            code, errors = finish(folder, script, url, path, file_limit=limit)
            lost = check_error(code, errors, 1, "free up some space")
            if path.exists():
                lost = lost or "an incomplete file has the name of the complete one"
            lost = lost or check_success(*finish(folder, script, url, path))
            if not lost and path.read_bytes() != body:
                lost = "the file is not what was served"
            yield lost


# -----------------------------------------------------------------------------
# images and archives

@fault("images, hostile", quick=500, weight=0.5)
def images_hostile(folder, rng):
    while True:
        for name, data, expected in hostile_images(rng):
            path = folder / name
            path.write_bytes(data)
            try:
                image = load_image(str(path), 32)
                is_array = image.shape == (32, 32, 3) and image.dtype == np.uint8
                lost = f"{name}: was taken" if expected is False or not is_array else ""
            except UserError as error:
                lost = f"{name}: {error}" if expected else check_message(error, name)
            except BaseException as error:
                lost = f"{name}: {type(error).__name__}: {error}"
            yield lost
            path.unlink()


@fault("images, large or lying about it: memory", quick=0, weight=0.5)
def images_large(folder, rng):
    script = """
import resource, sys
from nanocaption.cli import UserError
from nanocaption.images import load_image
try:
    load_image(sys.argv[1], 32)
except UserError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    unit = 2**30 if sys.platform == "darwin" else 2**20
    tries = write_large_images(folder)
    for name, data, expected in hostile_images(rng):
        if name in ("bomb.png", "lies.png", "text.png", "texts.png", "tall.png", "wide.jpg"):
            (folder / name).write_bytes(data)
            tries[name] = expected
    for name, expected in itertools.cycle(tries.items()):
        done = subprocess.run([sys.executable, "-c", script, folder / name], cwd=HERE,
                              capture_output=True, text=True)
        gigabytes = int(done.stdout or 0) / unit  # of which 0.1 are Python's
        was_loaded = not done.stderr
        fine = 0 < gigabytes < 1.1 and expected in (None, was_loaded)
        yield "" if fine else f"{name}: {gigabytes:.2f} GB, {done.stderr[-200:]}"


def write_large_images(folder):
    """Returns {file name: whether it must be loaded}."""
    tries = {}
    for mode in ("RGBA", "P", "I", "I;16", "F", "CMYK", "RGB"):
        extension = "tif" if mode in ("F", "CMYK", "I") else "png"
        name = f"large_{mode.replace(';', '')}.{extension}"
        options = dict(transparency=0) if mode == "P" else {}
        Image.new(mode, (8000, 8000)).save(folder / name, **options)
        tries[name] = True
    Image.new("L", (20000, 8000)).save(folder / "large_progressive.jpg", progressive=True)
    tries["large_progressive.jpg"] = False
    Image.new("L", (13000, 13000)).save(folder / "large.jpg")
    tries["large.jpg"] = True
    return tries


@fault("folders and file names, hostile (a folder each)", quick=3, weight=0.3)
def names_hostile(folder, rng):
    prepare_training(folder)
    succeed(folder, "train.py", *train_arguments(folder, "trained", 1))
    image = image_bytes(Image.new("RGB", (40, 40), "blue"), "JPEG")
    good = ["plain.jpg", "new\nline.jpg", "quo'te\".jpg", "emoji😀.jpg", " blank .jpg", "-dash.jpg",
            "100%.jpg"]
    if sys.platform == "linux":
        good.append(os.fsdecode(b"latin\xe9.jpg"))  # macOS takes only UTF-8
    bad = ["pipe.jpg", "device.jpg", "link.jpg", "empty.jpg"]
    while True:
        inside = Path(tempfile.mkdtemp(dir=folder))
        for name in good:
            (inside / name).write_bytes(image)
        (inside / "folder.jpg").mkdir()
        os.mkfifo(inside / "pipe.jpg")
        os.symlink("/dev/zero", inside / "device.jpg")
        os.symlink(inside / "nowhere", inside / "link.jpg")
        (inside / "empty.jpg").touch()
        for options in ([], ["--json"]):
            code, errors = finish(folder, "sample.py", "--image", inside, "--device", "cpu",
                                  "--out_dir", folder / "trained", *options)
            captions = (folder / "io/output").read_text().splitlines()
            lines = [line for line in errors.splitlines() if "error:" in line]
            named = [name for name in bad if any(name in line for line in lines)]
            lost = ""
            if code != 1 or len(captions) != len(good) or named != bad or len(lines) != len(bad):
                lost = f"exit code {code}: {errors[-600:]!r}"
            elif options:
                found = sorted(json.loads(line)["image"] for line in captions)
                if found != sorted(str(inside / name) for name in good):
                    lost = f"names: {found}"
            yield lost
        lines = []
        for i, name in enumerate(good):
            if name.strip() == name:
                lines.append(json.dumps({"image": name, "captions": [f"an image named {i}"]}))
        (inside / "captions.jsonl").write_text("\n".join(lines))
        yield check_success(*finish(
            folder, "prepare_flickr.py", "--images", inside, "--captions",
            inside / "captions.jsonl", "--out_dir", folder / f"prepared_{inside.name}",
            "--vocab_size", 300, "--image_size", 16, "--workers", 1))


@fault("archives, hostile", quick=15, weight=0.3)
def archives_hostile(folder, rng):
    for name, (expected, message) in itertools.cycle(ARCHIVES.items()):
        inside = Path(tempfile.mkdtemp(dir=folder))
        write_archive(inside / name, folder, rng)
        captions = inside / "captions.token"
        lines = [f"{image}#0\ta dog runs past {image}\n" for image in captioned_names(name)]
        captions.write_text("".join(lines))
        before = list_files(folder)
        code, errors = finish(
            folder, "prepare_flickr.py", "--images", inside / name, "--captions", captions,
            "--out_dir", inside / "out", "--vocab_size", 300, "--image_size", 16, "--workers", 1)
        new = list_files(folder) - before
        new = [path for path in new if not path.startswith((f"{inside}/out", f"{folder}/io"))]
        if new:
            lost = f"wrote {new}"
        elif expected:
            lost = check_error(code, errors, expected, message)
        else:
            lost = check_success(code, errors) or check_all_blue(inside / "out/train_images.bin")
        yield f"{name}: {lost}" if lost else ""
        (inside / name).unlink()


def list_files(folder):
    """The paths of everything in a folder, at any depth."""
    return {str(path) for path in folder.rglob("*")}


def check_all_blue(path):
    """Returns "" if a file of pixels has only the good images of hostile.py's archives."""
    red = np.fromfile(path, np.uint8).reshape(-1, 3)[:, 0]
    return "" if red.max() < 30 else "the image of another entry was taken"


# -----------------------------------------------------------------------------
# caption files

@fault("caption files, mangled", quick=400, weight=1)
def captions_mangled(folder, rng):
    path = folder / "captions"
    while True:
        for format, text in caption_files(rng):
            path.write_text(text)
            yield check_captions(path, format, text, at_least=18)
            for _ in range(10):
                data, one_line_lost = mangle(text, rng)
                path.write_bytes(data)
                by_line = format in ("token", "bars", "json lines")
                yield check_captions(path, format, text, 15 if one_line_lost and by_line else 0)


def check_captions(path, format, text, at_least):
    """
    Returns "" if read_captions finds at_least captions in a file, none of them with a wrong image,
    or refuses it in one line. text: the file before it was mangled.
    """
    start = time.monotonic()
    lost = ""
    try:
        found = read_captions(path, [])
        wrong = wrong_captions(found, set(re.findall("Zq([0-9a-f]{12})", text)))
        if len(found) < at_least:
            lost = f"{len(found)} captions, expected {at_least}: {path.read_bytes()[:200]}"
        if wrong:
            lost = f"belongs to another image: {wrong[0]}"
    except UserError as error:
        lost = check_message(error, str(path))
        if at_least == 18:
            lost = f"was refused: {error}"
    except BaseException as error:
        lost = f"{type(error).__name__}: {str(error)[:200]}: {path.read_bytes()[:200]}"
    if time.monotonic() - start > 20:
        lost = lost or f"took {time.monotonic() - start:.0f} seconds"
    return f"{format}: {lost}" if lost else ""


def wrong_captions(found, stems):
    """Those of read_captions' list whose image is not the one that the caption names."""
    wrong = []
    for name, caption, _ in found:
        named = stems.intersection(re.findall("Zq([0-9a-f]{12})", caption))
        if name[:12] in stems and named and name[:12] not in named:
            wrong.append((name, caption))
    return wrong


# -----------------------------------------------------------------------------
# checkpoints

class Code:
    """Runs a command if it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def damaged_checkpoints(path, mark):
    """Yields (description, object): what a checkpoint could hold instead. mark: see Code."""
    changes = {
        "no tokenizer": dict(tokenizer=None),
        "another version": dict(version=9),
        "code": dict(options=Code(f"touch {mark}")),
        "no options": dict(options=None),
        "no weights": dict(model={}),
    }
    for what, change in changes.items():
        yield what, torch.load(path, weights_only=True) | change
    options = {
        "another size": dict(n_embd=32),
        "a size as text": dict(n_embd="32"),
        "another architecture": dict(encoder_family="x"),
    }
    for what, change in options.items():
        changed = torch.load(path, weights_only=True)
        changed["options"].update(change)
        yield what, changed
    weights = {"one more weight": dict(x=torch.zeros(1)), "no tensor": {"wte.weight": 1}}
    for what, change in weights.items():
        changed = torch.load(path, weights_only=True)
        changed["model"].update(change)
        yield what, changed
    changed = torch.load(path, weights_only=True)
    changed["model"].popitem()
    yield "one weight fewer", changed
    changed = torch.load(path, weights_only=True)
    changed["tokenizer"]["ranks"] = 5
    yield "no ranks", changed
    changed = torch.load(path, weights_only=True)
    del changed["tokenizer"]
    yield "no tokenizer", changed
    yield "not a dict", [1, 2]


@fault("checkpoints, damaged or foreign", quick=35, weight=0.3)
def checkpoints_damaged(folder, rng):
    prepare_training(folder)
    succeed(folder, "train.py", *train_arguments(folder, "trained", 3))
    whole = (folder / "trained/last.pt").read_bytes()
    path = folder / "x.pt"
    mark = folder / "owned"
    while True:
        for i in range(20):
            path.write_bytes(whole[:len(whole) * i // 20])
            yield check_refused(path, f"cut at {i}/20")
        for what, damaged in damaged_checkpoints(folder / "trained/last.pt", mark):
            torch.save(damaged, path)
            yield check_refused(path, what)
        yield "its code was run" if mark.exists() else ""


def check_refused(path, what):
    """Returns "" if a checkpoint is refused in one line that names it."""
    try:
        checkpoint.load(path, "cpu")
        return f"{what}: was taken"
    except UserError as error:
        lost = check_message(error, str(path))
    except BaseException as error:
        lost = f"{type(error).__name__}: {error}"
    return f"{what}: {lost}" if lost else ""


# -----------------------------------------------------------------------------
# options

def script_options(main):
    """The options of a script: {name: type}."""
    if main is train.main:
        return {field.name: field.type for field in dataclasses.fields(train.Options)}
    parse = mock.create_autospec(cli.Parser.parse_args, side_effect=SystemExit)
    with mock.patch.object(cli.Parser, "parse_args", parse):
        call_main(main, [])
    parser = parse.call_args.args[0]
    options = {}
    for action in parser._actions:
        if action.option_strings and action.dest != "help":
            options[action.dest] = action.type or (bool if action.nargs == 0 else str)
    return options


def call_main(main, arguments):
    """Calls a script's main; returns the exit code and what it printed."""
    output = io.StringIO()
    argv = [f"{main.__module__}.py", *map(str, arguments)]
    with (mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(output),
          contextlib.redirect_stderr(output)):
        try:
            main()
            return 0, output.getvalue()
        except SystemExit as exit:
            return exit.code, output.getvalue()
        except UserError as error:
            return 2, f"error: {error}\n"


def wrong_arguments(name, kind):
    """Yields (argument, what the message must contain) for an option."""
    last = "y" if name[-1] == "x" else "x"
    misspelled = f"--{name[:-1]}{last}"
    yield f"{misspelled}=1", misspelled
    values = []
    if kind in (int, float):
        values = ["abc", "", "-7", "nan", "inf"]
    if kind is int:
        values.append("1.5")
    if kind is bool:
        values = ["perhaps"]
    for value in values:
        yield f"--{name}={value}", name


@fault("options: wrong type, out of range, misspelled", quick=150, weight=0.3)
def options_wrong(folder, rng):
    # so that a script that takes a wrong option ends soon
    nowhere = str(folder / "nothing")
    needed = {
        train.main: ["--max_iters=1", "--data_dir", nowhere],
        sample.main: ["--image", "x.jpg", "--out_dir", nowhere],
        evaluate.main: ["--out_dir", nowhere],
        prepare_flickr.main: ["--images", nowhere, "--captions", nowhere],
        bench.main: ["--config", nowhere],
    }
    everything = []
    for main in needed:
        everything += [(main, name, kind) for name, kind in script_options(main).items()]
    while True:
        for main, name, kind in rng.sample(everything, len(everything)):
            for argument, part in wrong_arguments(name, kind):
                try:
                    code, output = call_main(main, [*needed[main], argument])
                except BaseException:
                    code, output = -1, traceback.format_exc()
                lost = check_error(code, output, 2, part)
                yield f"{main.__module__}.py {argument}: {lost}" if lost else ""


# -----------------------------------------------------------------------------
# the two forms

@pytest.mark.parametrize("name", [name for name, (_, quick, _) in FAULTS.items() if quick])
def test_nothing_is_lost(name, tmp_path):
    function, quick, _ = FAULTS[name]
    results = list(itertools.islice(function(tmp_path, random.Random(0)), quick))
    assert results
    assert not any(results), [lost for lost in results if lost]


def run_fault(function, seconds, seed):
    """Tries a fault for some time; returns how often it was survived (False) and lost (True)."""
    end = time.monotonic() + seconds
    counts = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        tries = function(Path(folder), random.Random(seed))
        for lost in tries:
            counts[bool(lost)] += 1
            if lost:
                print(f"    lost: {lost}", flush=True)
            if time.monotonic() > end:
                break
        tries.close()
    return counts


def main():
    """The long form; see the top of this file."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="for all faults (default: 30)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="only faults whose name contains this")
    args = parser.parse_args()
    cli.check_ranges(args, minutes=(0, 1e6))
    chosen = {name: found for name, found in FAULTS.items() if args.only in name}
    total = sum(weight for _, _, weight in chosen.values())
    n_lost = 0
    print(f"{'fault':62}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, (function, _, weight) in chosen.items():
        counts = run_fault(function, args.minutes * 60 * weight / total, args.seed)
        print(f"{name:62}{counts.total():>7,}{counts[False]:>10,}{counts[True]:>6,}", flush=True)
        n_lost += counts[True]
    if n_lost:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
