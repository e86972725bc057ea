"""Tests of serve.py over HTTP; tests/test_page.py has those of its page in a browser."""
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

import serve
from checkpoint import load
from helpers import HERE, ended, launch, one_line_error, random_images, run
from nanocaption.generate import caption
from nanocaption.images import load_image


def encoded(image, extension="png"):
    """An array as the bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, extension)
    return file.getvalue()


PHOTOS = [encoded(image) for image in random_images(12, 50).numpy()]


@pytest.fixture(scope="module")
def captioner(trained):
    return load(trained, "cpu", "float32")


@contextlib.contextmanager
def serving(captioner, host="127.0.0.1"):
    """A server in a thread of this process."""
    server = serve.Server(captioner, "tests", host, 0)
    threading.Thread(target=server.serve_forever, kwargs=dict(poll_interval=0.05)).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def server(captioner):
    with serving(captioner) as server:
        yield server


def request(server, method="POST", path="/caption", body=None, headers=None, timeout=30):
    """Sends a request; returns status, headers, body and, if it is JSON, its value."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=timeout)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        reply = connection.getresponse()
        body = reply.read()
    value = None
    if reply.headers["Content-Type"] == "application/json":
        value = json.loads(body)
    return SimpleNamespace(status=reply.status, headers=reply.headers, body=body, json=value)


def send_raw(server, data):
    """A connection on which data has been sent."""
    connection = socket.create_connection(server.server_address[:2], timeout=30)
    connection.sendall(data)
    return connection


def receive_all(connection):
    """What the server sends until it closes the connection."""
    data = b""
    with connection:
        while block := connection.recv(2**16):
            data += block
    return data


def head(length, host="localhost"):
    """The headers of a request with a body of this length."""
    return f"POST /caption HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n".encode()


# -----------------------------------------------------------------------------
# the page and the captions

def test_the_page_needs_nothing_from_elsewhere(server):
    reply = request(server, "GET", "/")
    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    page = reply.body.decode()
    assert "Good at tests;" in page and 'data-attention="1"' in page
    assert re.findall(r"""(?:src|href)="(?!data:,")""", page) == []
    assert "//" not in re.sub(r"(?m)(^|\s)// .*$", "", page)  # no address but comments
    policy = reply.headers["Content-Security-Policy"].split("; ")
    policy = dict(part.split(" ", 1) for part in policy)
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


@pytest.mark.parametrize("path", ["/index.html", "/nanocaption/page.html", "/../../etc/passwd",
                                  "//etc/passwd", "/out/flickr8k/best.pt", "/?", "/caption"])
def test_nothing_else_is_served(server, path):
    reply = request(server, "GET", path)
    assert reply.status == 404
    assert list(reply.json) == ["error"]


def test_a_caption_is_what_sample_prints(server, trained):
    done = run("sample.py", "--device=cpu", "--dtype=float32", "--json", "--image", "-",
               "--out_dir", trained, input=PHOTOS[0])
    expected = json.loads(done.stdout)
    found = request(server, body=PHOTOS[0]).json
    assert found == expected
    assert list(expected["captions"][0]) == ["text", "logprob"]


def test_curl_as_in_readme(server, tmp_path, captioner):
    """More than 1 MB, for which curl asks before it sends."""
    path = tmp_path / "photo.bmp"
    image = random_images(1, 700).numpy()[0]
    path.write_bytes(encoded(image, "bmp"))
    host, port = server.server_address
    command = ["curl", "-sS", "--data-binary", f"@{path}", f"http://{host}:{port}/caption"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    text = json.loads(done.stdout)["captions"][0]["text"]
    assert text == caption(captioner, path)


def test_attention(server, captioner):
    found = request(server, path="/caption?attention=1", body=PHOTOS[1]).json["captions"]
    assert len(found) == 1
    text, words = caption(captioner, PHOTOS[1], attention=True)
    assert found[0]["text"] == text
    assert [item["word"] for item in found[0]["attention"]] == text.split()
    for item, (_, expected) in zip(found[0]["attention"], words, strict=True):
        assert sum(map(sum, item["weights"])) == pytest.approx(1, abs=1e-3)
        assert item["weights"] == [pytest.approx(row, abs=1e-4) for row in expected.tolist()]


@pytest.mark.parametrize("sampling", [0, 1])
def test_other_captions(server, sampling):
    path = f"/caption?others=4&sampling={sampling}"
    found = request(server, path=path, body=PHOTOS[2]).json["captions"]
    assert found[0] == pytest.approx(request(server, body=PHOTOS[2]).json["captions"][0])
    assert len({item["text"] for item in found}) == len(found) == 5
    logprobs = [item["logprob"] for item in found[1:]]
    assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] < 0


def test_others_are_captions_of_a_wider_beam(server, captioner):
    found = request(server, path="/caption?others=2", body=PHOTOS[3]).json["captions"]
    image = load_image(PHOTOS[3], captioner.image_size)
    [beam] = serve.caption_images(captioner, image[None], beam=6, n_best=6)
    different = [item["text"] for item in beam if item["text"] != found[0]["text"]]
    assert {item["text"] for item in found[1:]} == set(list(dict.fromkeys(different))[:2])


# -----------------------------------------------------------------------------
# refusals

@pytest.mark.parametrize("path, body, status, message", [
    ("/caption", b"no image", 400, "not a readable image: cannot identify image file"),
    ("/caption", b"", 400, "not a readable image: cannot identify image file"),
    ("/caption", PHOTOS[0][:200], 400, "not a readable image:"),
    ("/caption?beam=5", PHOTOS[0], 400, "no parameter 'beam'; use attention, others, sampling"),
    ("/caption?others=9", PHOTOS[0], 400, "others must be a number from 0 to 8, not '9'"),
    ("/caption?others=", PHOTOS[0], 400, "others must be a number from 0 to 8, not ''"),
    ("/caption?attention=yes", PHOTOS[0], 400, "attention must be a number from 0 to 1"),
    ("/captions", PHOTOS[0], 404, "POST images to /caption"),
    ("/", PHOTOS[0], 404, "POST images to /caption"),
])
def test_wrong_requests(server, path, body, status, message):
    reply = request(server, path=path, body=body)
    assert reply.status == status
    assert message in reply.json["error"]
    assert str(HERE) not in str(reply.body) + str(reply.headers)


@pytest.mark.parametrize("length, status", [
    ("134217729", 413), ("1" * 18, 413), ("1" * 5000, 411), ("-1", 411), ("5.0", 411), ("", 411),
])
def test_wrong_lengths(server, length, status):
    reply = receive_all(send_raw(server, head(length)))
    assert reply.startswith(f"HTTP/1.1 {status} ".encode())


def test_a_form_is_refused_with_a_hint(server):
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    reply = request(server, body=b"--x\r\n", headers=form)
    assert reply.status == 415 and "--data-binary" in reply.json["error"]


def test_the_largest_length_is_not_refused(server):
    with send_raw(server, head(2**27)) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert b"the connection closed before the whole image arrived" in receive_all(connection)


def test_an_answer_arrives_even_if_the_body_was_not_read(server):
    for _ in range(5):
        reply = request(server, path="/elsewhere", body=b"x" * 2**24)
        assert reply.status == 404


@pytest.mark.parametrize("host, status", [
    ("localhost", 200), ("LOCALHOST:8000", 200), ("127.0.0.1:1", 200), ("127.0.0.2", 200),
    ("[::1]:8000", 200), ("evil.example", 403), ("localhost.evil.example:8000", 403),
    ("127.0.0.1.evil.example", 403), ("10.0.0.1", 403), ("[2001:db8::1]", 403), ("", 403),
    ("localhost:8000:1", 403), ("user@localhost", 403), ("[::1]x", 403),
])
def test_hosts(server, host, status):
    """A page of evil.example whose address is suddenly 127.0.0.1 has its name in Host."""
    assert request(server, "GET", "/", headers={"Host": host}).status == status
    assert request(server, body=PHOTOS[0], headers={"Host": host}).status == status


def test_requests_without_or_with_two_hosts(server):
    for hosts in (b"", b"Host: localhost\r\nHost: evil.example\r\n"):
        reply = receive_all(send_raw(server, b"GET / HTTP/1.1\r\n" + hosts + b"\r\n"))
        assert reply.startswith(b"HTTP/1.1 403 ")


def test_other_machines_may_use_any_address_but_no_name(captioner):
    with serving(captioner, "0.0.0.0") as server:
        for host, status in (("10.0.0.1:8000", 200), ("[2001:db8::1]", 200), ("0.0.0.0", 200),
                             ("localhost", 200), ("evil.example", 403)):
            assert request(server, "GET", "/", headers={"Host": host}).status == status


@pytest.mark.parametrize("origin, status", [
    ("http://localhost:8000", 200), ("http://localhost", 403), ("https://localhost:8000", 403),
    ("http://localhost:3000", 403), ("http://evil.example", 403), ("null", 403),
])
def test_origins(server, origin, status):
    headers = {"Host": "localhost:8000", "Origin": origin}
    reply = request(server, body=PHOTOS[0], headers=headers)
    assert reply.status == status
    assert "Access-Control-Allow-Origin" not in reply.headers


def test_pooled_queries_have_no_attention(captioner, monkeypatch):
    monkeypatch.setattr(captioner.model.options, "n_query", 4)
    with serving(captioner) as server:
        assert b'data-attention="0"' in request(server, "GET", "/").body
        reply = request(server, path="/caption?attention=1", body=PHOTOS[0])
    assert reply.status == 400
    assert "n_query=4" in reply.json["error"]


# -----------------------------------------------------------------------------
# many clients, and bad ones

def test_eight_clients_at_once(server, captioner):
    expected = caption(captioner, PHOTOS)

    def client(number):
        order = [(number + i) % len(PHOTOS) for i in range(len(PHOTOS))]
        return [(i, request(server, body=PHOTOS[i]).json["captions"][0]["text"]) for i in order]

    with ThreadPoolExecutor(8) as pool:
        found = sum(pool.map(client, range(8)), [])
    assert len(found) == 8 * len(PHOTOS)
    assert found == [(i, expected[i]) for i, _ in found]


@pytest.fixture
def gate(monkeypatch):
    """Until gate.open is set, the captioner works on its first batch. gate.batches: their sizes."""
    original = serve.caption_batch
    gate = SimpleNamespace(open=threading.Event(), batches=[])

    def caption_batch(captioner, images, settings):
        gate.batches.append((len(images), settings))
        assert gate.open.wait(60)
        return original(captioner, images, settings)

    monkeypatch.setattr(serve, "caption_batch", caption_batch)
    yield gate
    gate.open.set()


def wait_until(condition):
    """Waits until condition() is true."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_waits_is_captioned_as_a_batch(captioner, gate):
    """And what asks for something else is in another batch."""
    with serving(captioner) as server, ThreadPoolExecutor(20) as pool:
        paths = ["/caption"] * 10 + ["/caption?attention=1"] * 3
        first = pool.submit(request, server, body=PHOTOS[0])
        wait_until(lambda: gate.batches)
        others = [pool.submit(request, server, path=path, body=PHOTOS[i % len(PHOTOS)])
                  for i, path in enumerate(paths)]
        wait_until(lambda: server.jobs.qsize() == 13)
        gate.open.set()
        replies = [future.result().json["captions"][0] for future in others]
        assert first.result().status == 200
    assert gate.batches[0] == (1, serve.Settings())
    assert sorted(gate.batches[1:]) == [(2, serve.Settings()), (3, serve.Settings(attention=1)),
                                        (8, serve.Settings())]
    expected = caption(captioner, [PHOTOS[i % len(PHOTOS)] for i in range(13)])
    assert [reply["text"] for reply in replies] == expected
    assert ["attention" in reply for reply in replies] == [False] * 10 + [True] * 3


def test_the_65th_image_has_to_come_again(captioner, gate):
    with serving(captioner) as server, ThreadPoolExecutor(64) as pool:
        waiting = [pool.submit(request, server, body=PHOTOS[0]) for _ in range(64)]
        wait_until(lambda: server.jobs.qsize() + sum(n for n, _ in gate.batches) == 64)
        reply = request(server, body=PHOTOS[0])
        assert reply.status == 503
        assert "64 images are waiting already" in reply.json["error"]
        assert int(reply.headers["Retry-After"]) in range(1, 60)
        assert request(server, "GET", "/").status == 200
        gate.open.set()
        assert [future.result().status for future in waiting] == [200] * 64
        assert request(server, body=PHOTOS[0]).status == 200


def test_a_failure_of_the_captioner_is_an_answer(server, monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError(f"out of memory in {HERE}")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "caption_batch", fail)
        reply = request(server, body=PHOTOS[0])
    message = "the captioner failed; see the server's stderr"
    assert (reply.status, reply.json) == (500, {"error": message})
    error = capsys.readouterr().err
    assert error.startswith("serve.py: error: RuntimeError('out of memory")
    assert error.count("\n") == 1
    assert request(server, body=PHOTOS[0]).status == 200


def test_slow_half_and_aborted_requests_hinder_nobody(captioner, monkeypatch, capsys):
    monkeypatch.setattr(serve, "HEADER_SECONDS", 3)
    monkeypatch.setattr(serve, "BODY_SECONDS", 4)
    stop = threading.Event()

    def trickle(connection, data):
        """Sends a byte every 50 ms, as long as the server takes them."""
        with contextlib.suppress(OSError):
            for byte in data:
                if stop.wait(0.05):
                    break
                connection.sendall(bytes([byte]))

    with serving(captioner) as server:
        start = time.monotonic()
        idle = [send_raw(server, b"") for _ in range(64)]
        slow_head = send_raw(server, b"POST /caption HTTP/1.1\r\n")
        slow_body = send_raw(server, head(10**6))
        half_body = send_raw(server, head(len(PHOTOS[0])) + PHOTOS[0][:100])
        threads = [threading.Thread(target=trickle, args=(slow_head, b"X-Slow: " + b"x" * 500)),
                   threading.Thread(target=trickle, args=(slow_body, b"x" * 500))]
        for thread in threads:
            thread.start()
        for _ in range(5):
            # gone before the answer
            send_raw(server, head(len(PHOTOS[0])) + PHOTOS[0]).close()
            send_raw(server, head(len(PHOTOS[0])) + PHOTOS[0][:100]).close()
        expected = caption(captioner, PHOTOS[:4])
        found = [request(server, body=photo).json["captions"][0]["text"] for photo in PHOTOS[:4]]
        assert found == expected
        assert time.monotonic() - start < 2.8  # while all of them were still open

        # each ends when its time is up, not when its bytes do
        assert [receive_all(connection) for connection in idle] == [b""] * 64
        assert receive_all(slow_head) == b""
        for connection in (half_body, slow_body):
            reply = receive_all(connection)
            assert reply.startswith(b"HTTP/1.1 408 ")
            assert b"did not arrive within 4 s" in reply
        assert 4 <= time.monotonic() - start < 20
        stop.set()
        for thread in threads:
            thread.join()
    assert capsys.readouterr().err == ""


def test_too_many_connections_are_closed(server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(serve, "MAX_THREADS", threading.active_count() // 2)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            request(server, "GET", "/")
    assert request(server, "GET", "/").status == 200


# -----------------------------------------------------------------------------
# the command

@contextlib.contextmanager
def started(folder, *args):
    """serve.py as a command, on a free port: its process and what request takes as a server."""
    process = launch(folder, "serve.py", "--port=0", "--device=cpu", "--dtype=float32", *args)
    try:
        wait_until(lambda: b"\n" in (folder / "output").read_bytes() or process.exitcode)
        line = (folder / "output").read_text()
        match = re.fullmatch(r"http://(127\.0\.0\.1):(\d+) \(Ctrl-C stops it\)\n", line)
        assert match, line + (folder / "errors").read_text()
        yield process, SimpleNamespace(server_address=(match[1], int(match[2])))
    finally:
        process.kill()


def memory(process):
    """A process's memory in MB, where /proc says it."""
    with open(f"/proc/{process.pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="there is no /proc")
def test_memory_does_not_grow(trained, tmp_path):
    photo = encoded(random_images(1, 600).numpy()[0], "jpeg")
    with started(tmp_path, "--out_dir", trained) as (process, server):
        sizes = []
        for n in (40, 160):
            with ThreadPoolExecutor(8) as pool:
                replies = pool.map(lambda _: request(server, body=photo), range(n))
                assert {reply.status for reply in replies} == {200}
            sizes.append(memory(process))
    assert sizes[1] - sizes[0] < 30


def test_the_page_says_what_the_bundled_checkpoint_is_good_at(tmp_path):
    with started(tmp_path, "--out_dir=out/flickr8k") as (_, server):
        page = request(server, "GET", "/").body
    assert f"Good at {serve.BUNDLED_GOOD_AT}" in page.decode()


def test_ctrl_c_ends_it_at_once(trained, tmp_path):
    """While it captions, and while connections are open."""
    with started(tmp_path, "--out_dir", trained) as (process, server):
        idle = send_raw(server, b"")
        stop = threading.Event()

        def ask():
            with contextlib.suppress(OSError, http.client.HTTPException):
                while not stop.is_set():
                    request(server, path="/caption?others=8", body=PHOTOS[0])

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        start = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        done = ended(process, tmp_path, timeout=10)
        seconds = time.monotonic() - start
        stop.set()
        idle.close()
        for thread in threads:
            thread.join()
    assert (done.returncode, done.stderr) == (130, b"serve.py: interrupted\n")
    assert seconds < 2


@pytest.mark.parametrize("args, parts", [
    ("--port 70000", ["port must be between 0 and 65535, not 70000"]),
    ("--port http", ["--port", "http"]),
    ("--host 192.0.2.1", ["cannot listen on 192.0.2.1 port 8000", "try another --host"]),
    ("--out_dir /nowhere", ["/nowhere", "checkpoint"]),
    ("--ports 80", ["--ports", "did you mean --port?"]),
])
def test_wrong_options(trained, args, parts):
    done = run("serve.py", "--out_dir", trained, *args.split(), check=False)
    one_line_error(done, 2, *parts)


def test_a_port_that_is_in_use(server, trained):
    port = server.server_address[1]
    done = run("serve.py", "--out_dir", trained, f"--port={port}", check=False)
    one_line_error(done, 2, f"cannot listen on 127.0.0.1 port {port}: Address already in use")
