"""
Breaks things on purpose, and looks whether anything was lost or went wrong in silence.

    python -m pytest test_faults.py                    # each fault a few times: seconds
    python test_faults.py --minutes 30 --seed 1        # as often as the time allows; prints a table

Each fault is a generator: every try of it yields "" where the program stood it, else what was lost.
"""
import argparse
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
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

import bench
import common
import evaluate
import prepare_flickr
import sample
import train
from common import UserError
from conftest import HERE, ended, launch, tiny_dataset
from prepare_flickr import load_image, read_captions

resource = pytest.importorskip("resource", reason="limits and signals of POSIX are what these tests break things with")
FAULTS = {}  # name: (generator, tries in the quick form, share of the heavy form's time)
SMALL = dict(image_size=16, patch_size=8, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=16, block_size=24, batch_size=8,
             crop=0.8, dropout=0.1, optimizer="muon", log_interval=1, eval_interval=3, eval_images=4, warmup_iters=2)


def fault(name, quick, share):
    def register(function):
        FAULTS[name] = function, quick, share
        return function
    return register


def printed(folder):
    """What the script that was launched last printed on stdout and stderr."""
    return "".join((folder / "io" / name).read_text(errors="replace") for name in ("output", "errors"))


def finish(folder, script, *arguments, **options):
    """A script of ours, to its end -> (exit code, what it printed on stderr)."""
    done = ended(launch(folder / "io", script, *arguments, **options), folder / "io")
    return done.returncode, done.stderr.decode(errors="replace")


def one_line(code, errors, wanted, *parts):
    """"" where a script ended with the exit code that was wanted and one line on stderr with these parts, else what it did."""
    lines = [line for line in errors.splitlines() if "seconds left" not in line]  # of progress
    if code == wanted and len(lines) == 1 and "Traceback" not in errors and all(part in lines[0] for part in parts):
        return ""
    return f"exit code {code} for {wanted}, expected {parts}: {errors[-300:]!r}"


# ---- training that is killed, stopped, or finds the disk full

def tiny_data(folder):
    tiny_dataset(folder / "data")
    (folder / "config.py").write_text("".join(f"{k} = {v!r}\n" for k, v in SMALL.items()))


def command(folder, name, steps):
    return [folder / "config.py", f"--data_dir={folder}/data", f"--out_dir={folder}/{name}", f"--max_iters={steps}",
            "--init_from=resume"]


def state(out_dir):
    """All that a run has made, as comparable values, but for its times."""
    found = {}
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(out_dir / name, weights_only=True)
        del checkpoint["options"]["out_dir"]
        checkpoint.pop("seconds", None)
        checkpoint["running"] = checkpoint.get("running", [])[:-1]
        found |= {f"{name}: {key}": plain(value) for key, value in checkpoint.items()}
    times = {"seconds", "images_per_s", "captions_per_s"}
    found["log.jsonl"] = [{k: v for k, v in json.loads(line).items() if k not in times} for line in (out_dir / "log.jsonl").open()]
    return found


def plain(value):
    """Tensors as bytes, so that == compares to the bit."""
    if torch.is_tensor(value):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def loadable(out_dir):
    """"" where the checkpoints that there are can be loaded, down to their last byte."""
    for path in (out_dir / "last.pt", out_dir / "best.pt"):
        if path.exists():
            try:
                sample.build(torch.load(path, weights_only=True))
            except Exception as e:
                return f"{path.name} can't be loaded: {e}"
    return ""


def interrupted(how, folder, rng, steps=25):
    """Runs that `how(process, folder)` breaks at a random moment again and again until they are through: a yield for each time."""
    tiny_data(folder)
    began = time.monotonic()
    assert finish(folder, "train.py", *command(folder, "whole", steps))[0] == 0, printed(folder)
    took = time.monotonic() - began
    whole = state(folder / "whole")
    for number in itertools.count():
        out_dir = folder / f"broken{number}"
        had = False
        while True:
            process, lost = launch(folder / "io", "train.py", *command(folder, out_dir.name, steps)), ""
            process.join(rng.uniform(0, took))
            over = process.exitcode is not None
            if not over:
                lost = how(process, folder)
            elif process.exitcode:
                lost = f"exit code {process.exitcode}: {printed(folder)[-300:]}"
            lost = lost or loadable(out_dir) or ("last.pt is gone" if had and not (out_dir / "last.pt").exists() else "")
            had = (out_dir / "last.pt").exists()
            if over and not lost and state(out_dir) != whole:
                lost = "not the same as the run that nothing broke: " + ", ".join(
                    name for name, value in state(out_dir).items() if value != whole[name])
            yield lost
            if over or lost:
                break


@fault("training, killed (SIGKILL)", quick=5, share=6)
def killed(folder, rng):
    def how(process, folder):
        process.kill()
        process.join()
        return ""
    yield from interrupted(how, folder, rng)


@fault("training, told to stop (SIGTERM, SIGINT, SIGINT twice)", quick=3, share=3)
def told_to_stop(folder, rng):
    def how(process, folder):
        number, times = rng.choice([(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)
            time.sleep(0.01)
        process.join(60)
        code, output = process.exitcode, printed(folder)
        process.kill()
        unread = "train.py" not in output and "common.py" not in output  # no line of the script had run
        if "Traceback" in output and not unread:
            return output[-300:]
        out_dir = max(folder.glob("broken*"), key=lambda path: int(path.name[6:]), default=folder / "none")  # not yet made
        saved = torch.load(out_dir / "last.pt", weights_only=True)["iter"] if (out_dir / "last.pt").exists() else 0
        if code == 0:  # it was through just then, or had been before
            return "" if saved == 25 else f"exit code 0 at step {saved}"
        if "\nstep " not in output:  # before it listened: 130 by common.py, or Python's own answers
            return "" if code in (128 + number, -number) or code == 1 and unread else f"exit code {code}: {output}"
        if code == 130 and times == 2:  # left at once
            return "a half-written file is left" * any(out_dir.glob("*.tmp*"))
        stopped = re.search(r"stopped at step (\d+)", output)
        return "" if code == 128 + number and stopped and int(stopped[1]) == saved else f"exit code {code}, saved {saved}: {output[-200:]}"
    yield from interrupted(how, folder, rng)


@fault("training, no room on the disk", quick=2, share=1)
def training_without_room(folder, rng):
    tiny_data(folder)
    steps = 12
    assert finish(folder, "train.py", *command(folder, "whole", steps))[0] == 0
    whole, size = state(folder / "whole"), (folder / "whole/last.pt").stat().st_size
    for number in itertools.count():
        out_dir = folder / f"full{number}"
        if number % 2:  # with an earlier checkpoint that must survive
            finish(folder, "train.py", *command(folder, out_dir.name, rng.randint(3, 9)))
        code, output = finish(folder, "train.py", *command(folder, out_dir.name, steps), file_limit=rng.randint(100, size - 1))
        lost = one_line(code, output, 1, "make room") or loadable(out_dir)
        if number % 2 and not (out_dir / "last.pt").exists():
            lost = lost or "last.pt is gone"
        if not lost:
            code, output = finish(folder, "train.py", *command(folder, out_dir.name, steps))
            if code or (number % 2 == 0 and state(out_dir) != whole):
                lost = f"did not go on: exit code {code}: {output[-300:]}"
        yield lost


@fault("one of two ranks, killed", quick=0, share=2)
def rank_killed(folder, rng):
    tiny_data(folder)
    torchrun = lambda name: subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(HERE / "train.py"),
         *map(str, command(folder, name, 60))], stdout=open(folder / "output", "w"), stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    if torchrun("whole").wait(300):
        raise RuntimeError((folder / "output").read_text())
    whole = state(folder / "whole")
    for number in itertools.count():
        process, out_dir, lost = torchrun(f"pair{number}"), folder / f"pair{number}", ""
        while not (out_dir / "last.pt").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(rng.random())
        ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        if process.poll() is not None or not ranks:
            continue  # it was through already
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(rng.choice(ranks)), signal.SIGKILL)
        try:
            lost = "" if process.wait(60) else "exit code 0"
        except subprocess.TimeoutExpired:
            lost = "the other rank was still there after a minute"
            process.kill()
        if not lost and torchrun(out_dir.name).wait(300):
            lost = f"did not go on: {(folder / 'output').read_text()[-300:]}"
        if not lost and state(out_dir) != whole:
            lost = "not the same as the pair that nothing broke"
        yield lost or loadable(out_dir)


@fault("a long run: memory, open files, disk (a try: 2,000 steps)", quick=0, share=2)
def long_run(folder, rng):
    if not os.path.exists("/proc"):
        return  # and the table says: 0 tried
    tiny_data(folder)
    steps, first = 10_000, None
    process = launch(folder / "io", "train.py", *command(folder, "long", steps), "--eval_interval=20", "--log_interval=100")
    try:
        for goal in range(2000, steps + 1, 2000):
            log, it = folder / "long/log.jsonl", 0
            while it < goal and process.exitcode is None:
                time.sleep(0.05)
                it = json.loads(log.read_text().rstrip("\n").rsplit("\n", 1)[-1])["iter"] if log.exists() and log.stat().st_size else 0
            if goal == steps:
                process.join()
                yield "" if process.exitcode == 0 else f"exit code {process.exitcode}"
                return
            files = []
            for _ in range(5):  # those that are open for a moment only are not all there five times
                files.append(len(os.listdir(f"/proc/{process.pid}/fd")))
                time.sleep(0.03)
            now = bench.anonymous_memory(process.pid), min(files), sum(p.stat().st_size for p in (folder / "long").glob("*.pt"))
            first = first or now
            yield "" if now[0] < first[0] * 1.05 + 2 and now[1] <= first[1] + 1 and now[2] <= first[2] * 1.01 else f"{first} grew to {now}"
    finally:
        process.kill()


# ---- preparing that is killed or finds the disk full

def photos(folder, n=30):
    """Pictures and captions as people have them."""
    (folder / "photos").mkdir()
    lines = []
    for i in range(n):
        noise = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(noise).resize((400, 300)).save(folder / f"photos/p{i}.jpg")
        lines += [f"p{i}.jpg#{k}\ta dog number {i} runs {k} times\n" for k in range(3)]
    (folder / "captions.token").write_text("".join(lines))


def prepare_command(folder, name):
    return ["--images", folder / "photos", "--captions", folder / "captions.token", "--out_dir", folder / name, "--workers", 2,
            "--vocab_size", 300, "--image_size", 64]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@fault("preparing, killed (SIGKILL)", quick=2, share=2)
def prepare_killed(folder, rng):
    photos(folder)
    began = time.monotonic()
    assert finish(folder, "prepare_flickr.py", *prepare_command(folder, "whole"))[0] == 0, printed(folder)
    took, whole = time.monotonic() - began, contents(folder / "whole")
    for number in itertools.count():
        name = f"killed{number}"
        process = launch(folder / "io", "prepare_flickr.py", *prepare_command(folder, name))
        process.join(rng.uniform(0, took))
        process.kill()
        process.join()
        for _ in range(100):  # workers see at once that their parent is gone, but not in no time
            code, output = finish(folder, "prepare_flickr.py", *prepare_command(folder, name))
            if "another process" not in output:
                break
            time.sleep(0.05)
        yield same_bytes(code, output, folder / name, whole)


def same_bytes(code, output, folder, whole):
    if code:
        return f"exit code {code}: {output[-300:]}"
    found = contents(folder)
    return "" if found == whole else f"differs: {[n for n in found | whole if found.get(n) != whole.get(n)]}"


@fault("preparing, no room on the disk", quick=2, share=1)
def prepare_without_room(folder, rng):
    photos(folder)
    assert finish(folder, "prepare_flickr.py", *prepare_command(folder, "whole"))[0] == 0
    whole = contents(folder / "whole")
    for number in itertools.count():
        name, limit = f"full{number}", rng.randint(1, max(map(len, whole.values())) - 1)
        code, output = finish(folder, "prepare_flickr.py", *prepare_command(folder, name), file_limit=limit)
        lost = one_line(code, output, 1, "make room") or ("meta.json is there" if (folder / name / "meta.json").exists() else "")
        yield lost or same_bytes(*finish(folder, "prepare_flickr.py", *prepare_command(folder, name)), folder / name, whole)


@fault("two at once in one folder: preparing, training", quick=3, share=1)
def two_at_once(folder, rng):
    photos(folder)
    tiny_data(folder)
    (folder / "two").mkdir()
    lock = common.exclusive(folder / "two")
    yield one_line(*finish(folder, "prepare_flickr.py", *prepare_command(folder, "two")), 2, "another process")
    yield one_line(*finish(folder, "train.py", *command(folder, "two", 1)), 2, "another process")
    lock.close()
    assert finish(folder, "prepare_flickr.py", *prepare_command(folder, "whole"))[0] == 0
    whole = contents(folder / "whole")
    for number in itertools.count():
        processes = [launch(folder / io, "prepare_flickr.py", *prepare_command(folder, f"two{number}")) for io in ("io", "io2")]
        codes = sorted(ended(process, folder / io).returncode for process, io in zip(processes, ("io", "io2")))
        lost = "" if codes in ([0, 0], [0, 2]) else f"exit codes {codes}"
        yield lost or same_bytes(0, "", folder / f"two{number}", whole)


# ---- downloads and addresses

class Handler(http.server.BaseHTTPRequestHandler):
    """What it serves is told by the address: /picture, /slow, /endless, /loop, /elsewhere, /nonsense, /page, /404, /short."""
    picture = b""

    def do_GET(self):
        what = self.path.split("?")[0].strip("/")
        if what in ("loop", "elsewhere", "nonsense"):
            self.send_response(302)
            self.send_header("Location", {"loop": "/loop", "elsewhere": "ftp://example.org/x.jpg", "nonsense": "http://["}[what])
            return self.end_headers()
        self.send_response(404 if what == "404" else 200)
        body = self.picture if what in ("picture", "slow", "short") else b"<html>no picture</html>"
        if what != "endless":
            self.send_header("Content-Length", str(len(body) + (what == "short") * 10))
        self.end_headers()
        with contextlib.suppress(OSError):
            if what == "slow":
                for byte in body:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.05)
            while what == "endless":
                self.wfile.write(bytes(1 << 16))
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def website(handler=Handler):
    os.environ["no_proxy"] = "127.0.0.1"
    site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    site.daemon_threads = True
    threading.Thread(target=site.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{site.server_port}"
    finally:
        site.shutdown()
        site.server_close()


@fault("addresses of pictures", quick=11, share=0.2)
def addresses(folder, rng):
    Image.new("RGB", (60, 40), "red").save(buffer := io.BytesIO(), "JPEG")
    Handler.picture = buffer.getvalue()
    limits = common.PICTURE_BYTES, common.PICTURE_SECONDS
    common.PICTURE_BYTES, common.PICTURE_SECONDS = 1 << 20, 1
    try:
        with website() as site:
            for path, said in itertools.cycle((
                    ("picture", ""), ("slow", "after 1 seconds"), ("endless", "more than 1 MB"), ("loop", "redirects"), ("nonsense", "can't be fetched"),
                    ("elsewhere", "can't be fetched"), ("page", "not a readable picture"), ("404", "404"), ("short", "can't be fetched"),
                    ("refused", "can't be fetched"), ("ftp", "only http"))):
                address = {"refused": "http://127.0.0.1:9/x.jpg", "ftp": "ftp://127.0.0.1/x.jpg"}.get(path, f"{site}/{path}")
                try:
                    [(name, source, _)] = sample.find_pictures([address], "val", None)
                    image = load_image(source, 16)
                    yield "" if not said and abs(image.astype(int) - [254, 0, 0]).max() < 3 else f"{address}: was taken"
                except UserError as e:
                    message = str(e)
                    yield "" if said and said in message and address in message and "\n" not in message else f"{address}: {message}"
    finally:
        common.PICTURE_BYTES, common.PICTURE_SECONDS = limits


@fault("downloading, no room on the disk", quick=1, share=0.2)
def download_without_room(folder, rng):
    body = rng.randbytes(300_000)

    class Tagged(Handler):
        def do_GET(self):
            first = int(re.sub(r"\D", "", self.headers.get("Range", "0")) or 0)
            self.send_response(206 if first else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(body) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[first:])

    script = folder / "fetch.py"
    script.write_text("import sys, common\ncommon.WAIT = 0.01\ncommon.run(lambda: common.download(*sys.argv[1:]))\n")
    with website(Tagged) as site:
        for number in itertools.count():
            path = folder / f"file{number}"
            code, output = finish(folder, script, site, path, file_limit=rng.randint(1000, len(body) - 1))
            lost = one_line(code, output, 1, "make room") or ("half a file has the whole one's name" if path.exists() else "")
            code, output = (0, "") if lost else finish(folder, script, site, path)
            yield lost or ("" if code == 0 and path.read_bytes() == body else f"exit code {code}: {output[-300:]}")


# ---- pictures, archives, captions

def hostile_pictures(rng):
    """Yields (name, bytes, what must come: True a picture, False an error, None either)."""
    noise = Image.fromarray(np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (48, 64, 3), np.uint8))

    def encoded(image, format, **options):
        image.save(buffer := io.BytesIO(), format, **options)
        return buffer.getvalue()

    yield "one.png", encoded(noise.resize((1, 1)), "PNG"), True
    yield "tall.png", encoded(noise.resize((1, 20000)), "PNG"), True
    yield "wide.jpg", encoded(noise.resize((20000, 1)), "JPEG"), True
    yield "bomb.png", encoded(Image.new("1", (20000, 20000)), "PNG"), False
    header = bytearray(encoded(noise, "PNG"))
    header[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    yield "lies.png", bytes(header), False
    yield "code.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n%%EndComments\n{} loop\n", False
    for mode, format in (("CMYK", "JPEG"), ("L", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("I", "TIFF"),
                         ("F", "TIFF"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG"), ("HSV", "TIFF")):
        with contextlib.suppress(OSError, ValueError, KeyError):  # what this Pillow can't write is nothing to try
            image = Image.new(mode, (64, 48)) if mode in ("I;16", "I", "F", "LAB") else noise.convert(mode)
            yield f"mode_{mode}.{format.lower()}", encoded(image, format), None if mode == "HSV" else True
    yield "palette.png", encoded(noise.convert("P"), "PNG", transparency=bytes(range(256))), True
    yield "animated.gif", encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90), noise]), True
    yield "animated.webp", encoded(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)]), True
    for orientation in range(10):  # 1 to 8 are defined
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif{orientation}.jpg", encoded(noise, "JPEG", exif=exif), True
    for i in range(30):
        exif = Image.Exif()
        exif[0x0112] = 6
        broken = bytearray(exif.tobytes() + rng.randbytes(40))
        for _ in range(5):
            broken[rng.randrange(6, len(broken))] = rng.randrange(256)
        yield f"exif_broken{i}.jpg", encoded(noise, "JPEG", exif=bytes(broken)), True
        yield f"icc_broken{i}.jpg", encoded(noise, "JPEG", icc_profile=rng.randbytes(200)), True
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 500_000, zip=True)
    yield "text.png", encoded(noise, "PNG", pnginfo=text), None
    text = PngImagePlugin.PngInfo()
    for i in range(80):
        text.add_text(f"comment{i}", "x" * 1_000_000, zip=True)
    yield "texts.png", encoded(noise, "PNG", pnginfo=text), None
    formats = {"jpg": encoded(noise, "JPEG"), "png": encoded(noise, "PNG"), "gif": encoded(noise.convert("P"), "GIF"),
               "webp": encoded(noise, "WEBP"), "bmp": encoded(noise, "BMP"), "tif": encoded(noise, "TIFF")}
    for extension, data in formats.items():
        yield f"whole.{extension}", data, True
        for twentieth in range(20):
            yield f"cut{twentieth}.{extension}", data[:len(data) * twentieth // 20], False if twentieth < 8 else None
        for i in range(45):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 1, 10, 100))):
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
            yield f"flipped{i}.{extension}", bytes(broken), None
        yield f"wrong_{extension}.{'png' if extension == 'jpg' else 'jpg'}", data, True
        yield f"tail.{extension}", data + rng.randbytes(1000), True
        yield f"noise.{extension}", rng.randbytes(2000), False


@fault("pictures, hostile", quick=500, share=0.5)
def pictures(folder, rng):
    while True:
        for name, data, wanted in hostile_pictures(rng):
            path = folder / name
            path.write_bytes(data)
            try:
                image = load_image(str(path), 32)
                fine = wanted is not False and image.shape == (32, 32, 3) and image.dtype == np.uint8
                lost = "" if fine else f"{name}: was taken"
            except UserError as e:
                lost = "" if not wanted and name in str(e) and "\n" not in str(e) else f"{name}: {e}"
            except BaseException as e:
                lost = f"{name}: {type(e).__name__}: {e}"
            yield lost
            path.unlink()


@fault("pictures, large or pretending: memory", quick=0, share=0.5)
def large_pictures(folder, rng):
    measure = """
import resource, sys
from prepare_flickr import UserError, load_image
try:
    load_image(sys.argv[1], 32)
except UserError as e:
    print(e, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    files = [f"large_{mode.replace(';', '')}.{'tif' if mode in ('F', 'CMYK', 'I') else 'png'}" for mode in ("RGBA", "P", "I", "I;16", "F", "CMYK", "RGB")]
    for file, mode in zip(files, ("RGBA", "P", "I", "I;16", "F", "CMYK", "RGB")):
        Image.new(mode, (8000, 8000)).save(folder / file, **(dict(transparency=0) if mode == "P" else {}))
    Image.new("L", (20000, 8000)).save(folder / "large_progressive.jpg", progressive=True)
    Image.new("L", (13000, 13000)).save(folder / "large.jpg")
    tries = [(file, file != "large_progressive.jpg") for file in [*files, "large_progressive.jpg", "large.jpg"]]
    for name, data, wanted in hostile_pictures(rng):
        if name in ("bomb.png", "lies.png", "text.png", "texts.png", "tall.png", "wide.jpg"):
            (folder / name).write_bytes(data)
            tries.append((name, wanted))
    for name, wanted in itertools.cycle(tries):
        done = subprocess.run([sys.executable, "-c", measure, folder / name], cwd=HERE, capture_output=True, text=True)
        used = int(done.stdout or 0) / (2 ** 20 if sys.platform != "darwin" else 2 ** 30)
        fine = 0 < used < 1.1 and wanted in (None, not done.stderr)  # 0.1 GB is Python's own
        yield "" if fine else f"{name}: {used:.2f} GB, {done.stderr[-200:]}"


@fault("folders and names, hostile (a try: a whole folder)", quick=3, share=0.3)
def names(folder, rng):
    tiny_data(folder)
    assert finish(folder, "train.py", *command(folder, "trained", 1))[0] == 0
    good = io.BytesIO()
    Image.new("RGB", (40, 40), "blue").save(good, "JPEG")
    while True:
        inside = Path(tempfile.mkdtemp(dir=folder))
        fine = ["plain.jpg", "new\nline.jpg", "quo'te\".jpg", "emoji😀.jpg", " blank .jpg", "-dash.jpg", "100%.jpg"]
        fine += [os.fsdecode(b"latin\xe9.jpg")] * (sys.platform == "linux")  # macOS takes none but UTF-8
        for name in fine:
            (inside / name).write_bytes(good.getvalue())
        (inside / "folder.jpg").mkdir()  # in which there are no pictures
        os.mkfifo(inside / "pipe.jpg")
        os.symlink("/dev/zero", inside / "device.jpg")
        os.symlink(inside / "nowhere", inside / "link.jpg")
        (inside / "empty.jpg").touch()
        bad = ["pipe.jpg", "device.jpg", "link.jpg", "empty.jpg"]
        for more in ([], ["--json"]):
            code, output = finish(folder, "sample.py", "--image", inside, "--out_dir", folder / "trained", "--device", "cpu", *more)
            captions = (folder / "io/output").read_text().splitlines()
            errors = [line for line in output.splitlines() if "error:" in line]
            lost = "" if code == 1 and len(captions) == len(fine) and len(errors) == len(bad) else f"exit code {code}: {output[-600:]!r}"
            lost = lost or next((f"no error for {name}" for name in bad if not any(name in line for line in errors)), "")
            if more and not lost:
                found = sorted(json.loads(line)["image"] for line in captions)
                lost = "" if found == sorted(str(inside / name) for name in fine) else f"names: {found}"
            yield lost
        lines = [json.dumps({"image": name, "captions": [f"a picture named {i}"]}) for i, name in enumerate(fine) if name.strip() == name]
        (inside / "captions.jsonl").write_text("\n".join(lines))
        code, output = finish(folder, "prepare_flickr.py", "--images", inside, "--captions", inside / "captions.jsonl", "--vocab_size", 300,
                              "--out_dir", folder / f"prepared_{inside.name}", "--image_size", 16, "--workers", 1)
        yield f"exit code {code}: {output}" if code else ""


@fault("archives, hostile", quick=15, share=0.3)
def archives(folder, rng):
    Image.new("RGB", (40, 40), "blue").save(buffer := io.BytesIO(), "JPEG")
    good, other = buffer.getvalue(), b""
    Image.new("RGB", (40, 40), "red").save(buffer := io.BytesIO(), "JPEG")
    other = buffer.getvalue()
    n = 20

    def zipped(path, extra):
        with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for i in range(n):
                archive.writestr(f"in/p{i}.jpg", good)
            for name, data in extra:
                archive.writestr(name, data)

    def tarred(path, extra, links=()):
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in [*((f"in/p{i}.jpg", good) for i in range(n)), *extra]:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            for name, target, kind in links:
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                archive.addfile(info)

    def encrypted(path):
        zipped(path, [])
        data = bytearray(path.read_bytes())
        for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            for found in re.finditer(mark, bytes(data)):
                data[found.start() + place] |= 1
        path.write_bytes(data)

    zeros = bytes(300 << 20)
    cases = [("climbs.zip", lambda p: zipped(p, [("../../up.jpg", other)]), 0, ""),
             ("absolute.zip", lambda p: zipped(p, [(str(folder / "abs.jpg"), other)]), 0, ""),
             ("double.zip", lambda p: zipped(p, [("in/p0.jpg", other)]), 0, ""),
             ("rival.zip", lambda p: zipped(p, [("else/p0.jpg", other)]), 2, "p0.jpg may be"),
             ("encrypted.zip", encrypted, 2, "encrypted"),
             ("bomb.zip", lambda p: zipped(p, [("in/p20.jpg", zeros)]), 2, "no picture's file is so large"),
             ("cut.zip", lambda p: (zipped(p, []), p.write_bytes(p.read_bytes()[:-100])), 2, "cut.zip"),
             ("climbs.tar", lambda p: tarred(p, [("../../up.jpg", other)]), 0, ""),
             ("absolute.tar.gz", lambda p: tarred(p, [(str(folder / "abs.jpg"), other)]), 0, ""),
             ("links.tar", lambda p: tarred(p, [], [("in/p20.jpg", "/etc/passwd", tarfile.SYMTYPE), ("out", "/", tarfile.SYMTYPE),
                                                    ("in/p21.jpg", "/etc/passwd", tarfile.LNKTYPE)]), 2, "no such picture"),
             ("double.tar", lambda p: tarred(p, [("in/p0.jpg", other)]), 0, ""),
             ("bomb.tar.gz", lambda p: tarred(p, [("in/p20.jpg", zeros)]), 2, "no picture's file is so large"),
             ("cut.tar.gz", lambda p: (tarred(p, []), p.write_bytes(p.read_bytes()[:-50])), 2, "cut.tar.gz"),
             ("cut.tar", lambda p: (tarred(p, []), p.write_bytes(p.read_bytes()[:9000])), 2, "cut.tar"),
             ("noise.zip", lambda p: p.write_bytes(rng.randbytes(3000)), 2, "noise.zip")]
    for number in itertools.count():
        name, make, wanted, said = cases[number % len(cases)]
        inside = Path(tempfile.mkdtemp(dir=folder))
        captions = inside / "captions.token"
        captions.write_text("".join(f"p{i}.jpg#0\ta dog number {i} runs\n" for i in range(n + ("bomb" in name) + 2 * ("links" in name))))
        make(inside / name)
        before = sorted(str(p) for p in folder.rglob("*"))
        argv = ["--images", inside / name, "--captions", captions, "--out_dir", inside / "out", "--vocab_size", 300, "--image_size", 16,
                "--workers", 1]
        code, output = finish(folder, "prepare_flickr.py", *argv)
        new = {p for p in map(str, folder.rglob("*")) if not p.startswith((f"{inside}/out", f"{folder}/io"))} - set(before)
        lost = f"wrote {new}" if new else "" if code == wanted == 0 else one_line(code, output, wanted, said) if wanted else output[-300:]
        if not lost and not wanted:
            images = np.fromfile(inside / "out/train_images.bin", np.uint8).reshape(-1, 3)
            lost = "" if images[:, 0].max() < 30 else "another entry's picture was taken"
        yield f"{name}: {lost}" if lost else ""
        (inside / name).unlink()


def caption_files(rng):
    """Yields (format, bytes): small files in all formats, each caption with its picture's name in it twice."""
    names = ["".join(rng.choice("0123456789abcdef") for _ in range(12)) for _ in range(6)]
    text = lambda name, k: f"Zq{name} runs, \"{k}\" times é Zq{name}"
    pairs = [(f"{name}.jpg", text(name, k)) for name in names for k in range(3)]
    quoted = lambda s: '"' + s.replace('"', '""') + '"'
    grouped = {f"{name}.jpg": [text(name, k) for k in range(3)] for name in names}
    yield "token", "".join(f"{name}#{i % 3}\t{caption}\n" for i, (name, caption) in enumerate(pairs))
    yield "csv", "image,caption\n" + "".join(f"{name},{quoted(caption)}\n" for name, caption in pairs)
    yield "bars", "image_name| comment_number| comment\n" + "".join(f"{n}| {i % 3}| {c}\n" for i, (n, c) in enumerate(pairs))
    yield "raw csv", "raw,filename,split\n" + "".join(f"{quoted(json.dumps(c))},{n},train\n" for n, c in grouped.items())
    yield "json lines", "".join(json.dumps({"image": n, "captions": c}) + "\n" for n, c in grouped.items())
    yield "names", json.dumps(grouped, indent=1)
    yield "karpathy", json.dumps({"images": [{"filename": n, "split": "train", "sentences": [{"raw": t} for t in c]}
                                             for n, c in grouped.items()]})
    yield "coco", json.dumps({"images": [{"id": i, "file_name": n} for i, n in enumerate(grouped)],
                              "annotations": [{"image_id": i, "caption": t} for i, c in enumerate(grouped.values()) for t in c]})


def mangle(text, rng):
    """A caption file broken in one of many ways -> (bytes, whether that may spoil one line alone)."""
    lines = text.encode().split(b"\n")
    i = rng.randrange(len(lines))
    kind = rng.randrange(13)
    if kind == 0:
        return text.encode()[:rng.randrange(len(text))], False
    if kind == 1:
        lines[i] = lines[i][:rng.randrange(len(lines[i]) + 1)]
    elif kind == 2:
        line = bytearray(lines[i] or b"x")
        for _ in range(rng.randint(1, 5)):
            line[rng.randrange(len(line))] ^= 1 << rng.randrange(8)
        lines[i] = bytes(line)
    elif kind == 3:
        return b"\xef\xbb\xbf" + b"\r\n".join(lines), True
    elif kind == 4:
        lines.insert(i, rng.randbytes(rng.randrange(200)).replace(b"\n", b""))
    elif kind == 5:
        lines.insert(i, b"x" * 10_000_000)
    elif kind == 6:
        lines[i] += b"\0" * rng.randint(1, 100) + b"\0"
    elif kind == 7:
        return text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-7"))), False
    elif kind == 8:
        return rng.randbytes(5000), False
    elif kind == 9:
        return rng.choice((b"[", b'{"a":')) * rng.choice((10, 100_000)), False
    elif kind == 10:
        lines[i] = lines[i].replace(rng.choice((b'"', b",", b"#", b"\t", b"|", b":", b"{")), rng.choice((b"", b'"', b"\xff", b"\t")))
    elif kind == 11:
        rng.shuffle(lines)
    else:
        lines[i] += rng.choice((b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xa8", b"\x1a", b"\x0c", b"\x85", b'"' * 999))
    return b"\n".join(lines), kind != 11


@fault("caption files, mangled", quick=400, share=1)
def captions(folder, rng):
    path = folder / "captions"
    while True:
        for kind, text in caption_files(rng):
            for data, one_spoilt in ((text.encode(), True), *(mangle(text, rng) for _ in range(10))):
                path.write_bytes(data)
                lost, began = "", time.monotonic()
                try:
                    found = read_captions(path, [])
                    real = set(re.findall("Zq([0-9a-f]{12})", text))
                    wrong = [(name, caption) for name, caption, _ in found if name[:12] in real
                             and (marks := real.intersection(re.findall("Zq([0-9a-f]{12})", caption))) and name[:12] not in marks]
                    if data == text.encode() and len(found) != 18:
                        lost = f"{kind}: {len(found)} captions of 18"
                    if one_spoilt and kind in ("token", "bars", "json lines") and len(found) < 15:
                        lost = f"{kind}: one line spoilt, {len(found)} captions of 18 found: {data[:200]}"
                    if wrong:
                        lost = f"{kind}: {wrong[0]} is not its picture's"
                except UserError as e:
                    lost = f"{kind}: {e}" if data == text.encode() or "\n" in str(e) or str(path) not in str(e) else ""
                except BaseException as e:
                    lost = f"{kind}: {type(e).__name__}: {str(e)[:200]}: {data[:200]}"
                if time.monotonic() - began > 20:
                    lost = lost or f"{kind}: took {time.monotonic() - began:.0f} seconds"
                yield lost


# ---- checkpoints and options

class Code:
    def __reduce__(self):
        return os.system, ("touch owned",)


@fault("checkpoints, damaged or foreign", quick=35, share=0.3)
def checkpoints(folder, rng):
    tiny_data(folder)
    assert finish(folder, "train.py", *command(folder, "trained", 3))[0] == 0
    whole, path = (folder / "trained/last.pt").read_bytes(), folder / "x.pt"
    read = lambda: torch.load(folder / "trained/last.pt", weights_only=True)
    changes = [("version", lambda c: c.update(version=2)), ("code", lambda c: c.update(options=Code())),
               ("a model of another size", lambda c: c["options"].update(n_embd=32)), ("no tokenizer", lambda c: c.pop("tokenizer")),
               ("a weight less", lambda c: c["model"].popitem()), ("a weight more", lambda c: c["model"].update(x=torch.zeros(1))),
               ("a tensor's place", lambda c: c["model"].update({"wte.weight": 1})), ("another family", lambda c: c["options"].update(encoder_family="x")),
               ("no tokenizer's ranks", lambda c: c["tokenizer"].update(ranks=5)), ("a size as text", lambda c: c["options"].update(n_embd="32")),
               ("no options", lambda c: c.update(options=None)), ("no weights", lambda c: c.update(model={})), ("no dict", None)]
    while True:
        for twentieth in range(20):
            path.write_bytes(whole[:len(whole) * twentieth // 20])
            yield from refused(path, f"cut at {twentieth}/20")
        for what, change in changes:
            checkpoint = read()
            if change:
                change(checkpoint)
            torch.save(checkpoint if change else [1, 2], path)
            yield from refused(path, what)
        yield "the code was run" if Path("owned").exists() else ""


def refused(path, what):
    try:
        sample.load(path, "cpu")
        yield f"{what}: was taken"
    except UserError as e:
        yield "" if str(path) in str(e) and "\n" not in str(e) else f"{what}: {e}"
    except BaseException as e:
        yield f"{what}: {type(e).__name__}: {e}"


def options_of(main):
    """A script's options: {name: type}."""
    if main is train.main:
        return {f.name: f.type for f in dataclasses.fields(train.Options)}
    made, init = [], common.Parser.__init__
    common.Parser.__init__ = lambda self, **options: (made.append(self), init(self, **options))[1]
    try:
        called(main, ["--help"])
    finally:
        common.Parser.__init__ = init
    return {a.dest: a.type or (bool if a.nargs == 0 else str) for a in made[0]._actions if a.option_strings and a.dest != "help"}


def called(main, argv):
    """A script in this process -> (exit code, what it printed)."""
    out, sys_argv = io.StringIO(), sys.argv
    sys.argv = [f"{main.__module__}.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main()
        return 0, out.getvalue()
    except SystemExit as e:
        return e.code, out.getvalue()
    except UserError as e:
        return 2, f"error: {e}\n"
    finally:
        sys.argv = sys_argv


@fault("options: wrong type, out of range, misspelt", quick=150, share=0.3)
def options(folder, rng):
    nowhere = str(folder / "nothing")  # so that what is taken by mistake ends soon
    needed = {sample.main: ["--image", "x.jpg", "--out_dir", nowhere], evaluate.main: ["--out_dir", nowhere],
              train.main: ["--max_iters=1", "--data_dir", nowhere], prepare_flickr.main: ["--images", nowhere, "--captions", nowhere]}
    scripts = train.main, sample.main, evaluate.main, prepare_flickr.main, bench.main
    everything = [(main, name, kind) for main in scripts for name, kind in options_of(main).items()]
    while True:
        for main, name, kind in rng.sample(everything, len(everything)):
            tries = [(f"--{name[:-1]}{'x' if name[-1] != 'x' else 'y'}=1", "misspelt")]
            if kind in (int, float):
                tries += [(f"--{name}={value}", "wrong") for value in ("abc", "", "-7", "nan", "inf")]
                tries += [(f"--{name}=1.5", "wrong")] * (kind is int)
            if kind is bool:
                tries += [(f"--{name}=perhaps", "wrong")]
            for given, what in tries:
                try:
                    code, output = called(main, [*needed.get(main, ["--config", nowhere]), given])
                except BaseException:
                    code, output = -1, traceback.format_exc()
                lost = one_line(code, output, 2, name if what == "wrong" else given[2:given.index("=")])
                yield f"{main.__module__}.py {given}: {lost}" if lost else ""


# ---- the two forms

@pytest.mark.parametrize("name", [name for name, (_, quick, _) in FAULTS.items() if quick])
def test_nothing_is_lost(name, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE)
    function, quick, _ = FAULTS[name]
    results = list(itertools.islice(function(tmp_path, random.Random(0)), quick))
    assert results and not any(results), [lost for lost in results if lost]


@pytest.mark.parametrize("script", ["train.py", "sample.py", "evaluate.py", "prepare_flickr.py"])
def test_ctrl_c_while_importing_is_one_line(script):
    program = """
import runpy, sys

class Interrupt:  # comes at what takes long to import
    def find_spec(name, *rest):
        if name == "numpy":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt)
sys.argv = [sys.argv[1]]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program, script], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{script}: interrupted\n")


def main():
    parser = argparse.ArgumentParser(description="Breaks things on purpose for a while and prints what was lost.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", help="faults whose name has this in it")
    args = parser.parse_args()
    chosen = {name: f for name, f in FAULTS.items() if not args.only or args.only in name}
    total, failures = sum(share for _, _, share in chosen.values()), 0
    print(f"{'fault':62}{'tried':>7}{'survived':>10}{'lost':>6}")
    for name, (function, _, share) in chosen.items():
        end, counts = time.monotonic() + args.minutes * 60 * share / total, collections.Counter()
        with tempfile.TemporaryDirectory() as folder:
            tries = function(Path(folder), random.Random(args.seed))
            for lost in tries:
                counts[bool(lost)] += 1
                if lost:
                    print(f"    lost: {lost}", flush=True)
                if time.monotonic() > end:
                    break
            tries.close()
        failures += counts[True]
        print(f"{name:62}{counts.total():>7,}{counts[False]:>10,}{counts[True]:>6,}", flush=True)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
