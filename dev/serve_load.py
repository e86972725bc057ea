"""
Load test of serve.py: 8 clients at once send 50 photos each. Compares the captions with those of
sample.py --json, and the server's memory after 100 requests with that after 1,000. Linux only.

    python dev/serve_load.py --dtype float32
    python dev/serve_load.py --dtype bfloat16

The photos are random crops of those in assets/photos.
"""
import json
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanocaption.cli import Parser, run

CLIENTS = 8
PHOTOS = 50  # per client


def write_photos(folder):
    """Writes the clients' photos, JPEGs of various sizes."""
    rng = random.Random(0)
    sources = [Image.open(path) for path in sorted((ROOT / "assets" / "photos").glob("*.jpg"))]
    for i in range(CLIENTS * PHOTOS):
        source = sources[i % len(sources)]
        scale = rng.uniform(0.5, 1)
        width = int(scale * source.width)
        height = int(scale * source.height)
        x = rng.randrange(source.width - width + 1)
        y = rng.randrange(source.height - height + 1)
        crop = source.crop((x, y, x + width, y + height))
        enlarged = crop.resize((rng.randrange(300, 3000), rng.randrange(300, 3000)))
        enlarged.save(folder / f"{i:03}.jpg", quality=80)


def sample_captions(folder, dtype):
    """The texts of sample.py --json, in the order of the photos."""
    command = [sys.executable, "sample.py", "--dtype", dtype, "--json", "--image", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return [json.loads(line)["captions"][0]["text"] for line in done.stdout.splitlines()]


def post(address, body):
    """Posts an image to /caption. Returns the caption and the seconds that it took."""
    start = time.monotonic()
    request = urllib.request.Request(f"{address}/caption", body)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["captions"][0]["text"], time.monotonic() - start


def memory(process):
    """A process's memory in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--dtype", default="float32",
                        help="bfloat16 or float32 (default: float32)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_photos(folder)
        photos = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
        expected = sample_captions(folder, args.dtype)
    command = [sys.executable, "serve.py", "--port", "0", "--dtype", args.dtype]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[0]
        with ThreadPoolExecutor(CLIENTS) as clients:

            def ask(photos):
                return list(clients.map(lambda photo: post(address, photo), photos))

            ask(photos[:100])
            early = memory(server)
            start = time.monotonic()
            found = ask(photos)
            seconds = time.monotonic() - start
            alone = [post(address, photo) for photo in photos[:50]]
            ask(photos)
            ask(photos[:50])
            late = memory(server)
    finally:
        server.kill()
    same = sum(text == wanted for (text, _), wanted in zip(found, expected))
    rate_alone = len(alone) / sum(seconds for _, seconds in alone)
    print(f"{args.dtype}: {same} of {len(found)} captions are the same as sample.py's")
    print(f"{rate_alone:.1f} photos per second from one client, {len(found) / seconds:.1f} from "
          f"{CLIENTS}; slowest answer {max(seconds for _, seconds in found):.2f} s")
    print(f"memory: {early:.0f} MB after 100 requests, {late:.0f} MB after 1,000")


if __name__ == "__main__":
    run(main)
