"""
A web page: drop photos on it, see their captions and where the model looked for each word.

    python serve.py                      # with the bundled checkpoint, at http://127.0.0.1:8000
    python serve.py --out_dir out/nano --port 8080
    curl --data-binary @photo.jpg http://127.0.0.1:8000/caption

POST /caption takes an image file and returns the JSON of sample.py --json. Query parameters, as in
/caption?attention=1&others=4: attention=1 adds each word's attention map (word, weights); others=N
adds up to N other captions (N at most 8) from a wider beam or, with sampling=1, by sampling.
"""
import base64
import hashlib
import io
import ipaddress
import json
import os
import queue
import random
import re
import socket
import socketserver
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl

# in bfloat16, torch caches up to 1024 kernels, one for each input shape: 200 MB after a few hundred
# requests; it reads these limits when it is imported
for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(name, "64")

import numpy as np

from checkpoint import load
from nanocaption.attention_maps import check_attention
from nanocaption.cli import BUNDLED, ROOT, Parser, UserError, check_ranges, one_line, run
from nanocaption.download import IMAGE_BYTES
from nanocaption.generate import ENCODE_BATCH, caption_images, caption_record, encode_images
from nanocaption.images import load_image

# Every connection has a thread that reads its request. Two threads decode images, and one thread
# captions them in batches of whatever is waiting, which is faster than one image at a time.

HEADER_SECONDS = 10  # to receive a request's headers
BODY_SECONDS = 30  # to receive its body
SEND_SECONDS = 30  # to send the answer
MAX_WAITING = 64  # images that wait for their captions
MAX_BATCH = ENCODE_BATCH  # images captioned together; more is hardly faster
MAX_THREADS = 256  # further connections are closed at once
MAX_OTHERS = 8
GOOD_AT = "images like those it was trained on"
BUNDLED_GOOD_AT = "photos of people and dogs outdoors (it was trained on Flickr8k)"


class Refusal(Exception):
    """An error response: Refusal(HTTP status, message)."""


class Settings(NamedTuple):
    """What a request asks for besides the caption."""
    attention: int = 0  # 1: add attention maps
    others: int = 0     # at most this many other captions
    sampling: int = 0   # 1: sample the others; 0: take them from a wider beam


HIGHEST = Settings(attention=1, others=MAX_OTHERS, sampling=1)  # the largest values allowed


class Job(NamedTuple):
    """An image that is waiting for its captions."""
    image: np.ndarray  # uint8 (S, S, 3)
    settings: Settings
    captions: Future


# -----------------------------------------------------------------------------
# captions

def caption_batch(captioner, images, settings):
    """For each image, uint8 (N, S, S, 3): the caption that sample.py gives, then the others."""
    encoded = encode_images(captioner, images)
    captions = caption_images(captioner, encoded, attention=bool(settings.attention))
    if not settings.others:
        return captions
    # more than asked for, because some may be duplicates
    n = 2 * settings.others + 2
    if settings.sampling:
        others = caption_images(captioner, encoded, num_samples=n, seed=random.getrandbits(32))
    else:
        others = caption_images(captioner, encoded, beam=n, n_best=n)
    return [add_others(*pair, settings.others) for pair in zip(captions, others)]


def add_others(captions, others, n):
    """captions, then the first n new texts among others, sorted by probability."""
    different = {}
    for other in others:
        if other["text"] != captions[0]["text"]:
            different.setdefault(other["text"], other)
    best = list(different.values())[:n]
    return captions + sorted(best, key=lambda found: -found["logprob"])


def caption_waiting(captioner, jobs):
    """Captions the images that arrive in the queue, forever."""
    while True:
        waiting = [jobs.get()]
        while not jobs.empty():
            waiting.append(jobs.get())
        for settings in dict.fromkeys(job.settings for job in waiting):
            same = [job for job in waiting if job.settings == settings]
            for start in range(0, len(same), MAX_BATCH):
                batch = same[start:start + MAX_BATCH]
                try:
                    images = np.stack([job.image for job in batch])
                    captions = caption_batch(captioner, images, settings)
                    for job, found in zip(batch, captions):
                        job.captions.set_result(found)
                except Exception as error:
                    # out of memory, for example: the next batch may fit
                    print(one_line(f"serve.py: error: {error!r}"), file=sys.stderr)
                    message = "the captioner failed; see the server's stderr"
                    for job in batch:
                        job.captions.set_exception(Refusal(500, message))


# -----------------------------------------------------------------------------
# requests

class SocketReader(io.RawIOBase):
    """Reads from a socket until its deadline, however slowly bytes arrive; then TimeoutError."""

    def __init__(self, connection, seconds):
        self.connection = connection
        self.limit(seconds)

    def limit(self, seconds):
        """Sets the deadline, in seconds from now."""
        self.deadline = time.monotonic() + seconds

    def readable(self):
        return True

    def readinto(self, buffer):
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.connection.recv_into(buffer)


class Handler(BaseHTTPRequestHandler):
    """Answers one request. There is no access log."""
    protocol_version = "HTTP/1.1"  # curl expects 100-continue before it sends a large body
    server_version = "nanoCaption"
    sys_version = ""

    def setup(self):
        super().setup()
        self.rfile.close()
        self.socket_reader = SocketReader(self.connection, HEADER_SECONDS)
        self.rfile = io.BufferedReader(self.socket_reader)

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.reply_to(self.page)

    def do_POST(self):
        self.reply_to(self.caption)

    def reply_to(self, answer):
        """Calls answer, which returns a body and its content type or raises Refusal."""
        try:
            self.check_sender()
            body, content_type = answer()
            self.send(200, body, content_type)
        except Refusal as refusal:
            status, message = refusal.args
            self.send(status, as_bytes({"error": message}), "application/json")
            self.skip_body()

    def check_sender(self):
        """
        Raises Refusal if another site's page sent a request that it could read or that costs work.
        With DNS rebinding, the site's name is in Host; otherwise, a POST has its address in Origin.
        """
        host = self.headers.get_all("Host", [])
        if len(host) != 1 or not self.server.has_name(host[0]):
            raise Refusal(403, "unknown Host; use the server's IP address or its --host name")
        if self.headers.get("Origin", f"http://{host[0]}") != f"http://{host[0]}":
            raise Refusal(403, "requests from other sites are refused")

    def page(self):
        if self.path != "/":
            raise Refusal(404, "there is only one page, /")
        return self.server.page, "text/html; charset=utf-8"

    def caption(self):
        path, _, query = self.path.partition("?")
        if path != "/caption":
            raise Refusal(404, "POST images to /caption")
        settings = parse_settings(query)
        if self.headers.get("Content-Type", "").startswith("multipart/"):
            raise Refusal(415, "send the file itself, as curl --data-binary @photo.jpg does")
        captions = self.server.caption(self.read_body(), settings)
        return as_bytes(caption_record("-", captions)), "application/json"

    def read_body(self):
        """The body, an open binary file."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,18}", length):
            raise Refusal(411, "send the image as the body, with its Content-Length")
        length = int(length)
        if length > IMAGE_BYTES:
            raise Refusal(413, f"more than {IMAGE_BYTES >> 20} MB, too large for an image")
        body = io.BytesIO()
        self.socket_reader.limit(BODY_SECONDS)
        try:
            while body.tell() < length:
                block = self.rfile.read1(min(2**16, length - body.tell()))
                if not block:
                    raise Refusal(400, "the connection closed before the whole image arrived")
                body.write(block)
        except TimeoutError:
            raise Refusal(408, f"the image did not arrive within {BODY_SECONDS} s") from None
        body.seek(0)
        return body

    def send(self, status, body, content_type):
        self.connection.settimeout(SEND_SECONDS)
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if status == 503:
            self.send_header("Retry-After", "2")
        self.end_headers()
        self.wfile.write(body)

    def skip_body(self):
        """Discards what arrives within a second; otherwise, clients may lose the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.socket_reader.limit(1)
            while self.rfile.read1(2**16):
                pass


def parse_settings(query):
    """attention=1&others=4 -> Settings. Raises Refusal."""
    found = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in Settings._fields:
            raise Refusal(400, f"no parameter {name!r}; use {', '.join(Settings._fields)}")
        highest = getattr(HIGHEST, name)
        if not re.fullmatch("[0-9]", value) or int(value) > highest:
            raise Refusal(400, f"{name} must be a number from 0 to {highest}, not {value!r}")
        found[name] = int(value)
    return Settings(**found)


def as_bytes(record):
    """A dict -> a line of JSON."""
    return json.dumps(record).encode() + b"\n"


# -----------------------------------------------------------------------------
# the server

class Server(socketserver.ThreadingTCPServer):
    """Serves the page and captions."""
    allow_reuse_address = os.name != "nt"  # on Windows, two servers could share a port
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, captioner, good_at, host, port):
        self.captioner = captioner
        self.slots = threading.BoundedSemaphore(MAX_WAITING)
        self.decoders = ThreadPoolExecutor(2)
        self.jobs = queue.SimpleQueue()
        self.show_attention = True
        try:
            check_attention(captioner.model)
        except UserError:
            self.show_attention = False
        page = Path(ROOT, "nanocaption", "page.html").read_text(encoding="utf-8")
        page = page.replace("GOOD_AT", good_at)
        page = page.replace("SHOW_ATTENTION", str(int(self.show_attention)))
        self.page = page.encode()
        self.policy = content_policy(page)
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family, _, _, _, address = found[0]
            super().__init__(address, Handler)
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot listen on {host} port {port}: {reason}; try another --host "
                            "or --port") from None
        self.host = host.lower()
        self.is_local = ipaddress.ip_address(self.server_address[0]).is_loopback
        threading.Thread(target=caption_waiting, args=(captioner, self.jobs), daemon=True).start()

    def has_name(self, host):
        """
        Whether a request's Host names this server: localhost, --host or an IP address, which must
        be a loopback address unless --host allows connections from other machines.
        """
        match = re.fullmatch(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host.lower())
        name = match[1].strip("[]") if match else ""
        if name in ("localhost", self.host):
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or not self.is_local
        except ValueError:
            return False

    def caption(self, body, settings):
        """The captions of an image, an open file. Raises Refusal."""
        if not self.slots.acquire(blocking=False):
            raise Refusal(503, f"{MAX_WAITING} images are waiting already; try again soon")
        try:
            if settings.attention:
                check_attention(self.captioner.model)
            size = self.captioner.image_size
            with body:
                image = self.decoders.submit(load_image, body, size).result()
            job = Job(image, settings, Future())
            self.jobs.put(job)
            return job.captions.result()
        except UserError as error:
            raise Refusal(400, str(error).removeprefix("image: ")) from None
        finally:
            self.slots.release()

    def verify_request(self, request, client_address):
        return threading.active_count() < MAX_THREADS

    def handle_error(self, request, client_address):
        # clients may close a connection at any time
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def content_policy(page):
    """A Content-Security-Policy that allows only the page's own script and style."""
    hashes = {}
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag] = base64.b64encode(digest).decode()
    return (f"default-src 'none'; script-src 'sha256-{hashes['script']}'; "
            f"style-src 'sha256-{hashes['style']}'; img-src blob: data:; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--out_dir", default=BUNDLED,
        help="a checkpoint, or the folder that holds it (default: the bundled checkpoint)")
    add("--host", default="127.0.0.1",
        help="address to listen on; 0.0.0.0 lets other machines connect (default: 127.0.0.1)")
    add("--port", type=int, default=8000, help="port; 0: any free port (default: 8000)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 or mps (default: the best available)")
    add("--dtype", default="auto", help="bfloat16 or float32 (default: the faster one)")
    args = parser.parse_args()
    check_ranges(args, port=(0, 65535))
    captioner = load(args.out_dir, args.device, args.dtype)
    is_bundled = Path(args.out_dir).resolve().is_relative_to(Path(BUNDLED).resolve())
    good_at = BUNDLED_GOOD_AT if is_bundled else GOOD_AT
    server = Server(captioner, good_at, args.host, args.port)
    host, port = server.server_address[:2]
    address = f"[{host}]" if ":" in host else host
    warning = "" if server.is_local else "; anyone who can reach this machine can use it"
    print(f"http://{address}:{port} (Ctrl-C stops it{warning})", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print("serve.py: interrupted", file=sys.stderr, flush=True)
        # Python's own exit could crash while torch computes in another thread
        os._exit(130)


if __name__ == "__main__":
    run(main)
