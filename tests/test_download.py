"""Tests of nanocaption/download.py, against a server on this machine that misbehaves."""
import hashlib
import http.server
import os
import random
import shutil
import threading

import pytest

from nanocaption import download
from nanocaption.cli import UserError


class Mirror(http.server.BaseHTTPRequestHandler):
    """
    Serves server.files. Each request takes the next word of server.script, which says what goes
    wrong with it.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        trouble = server.script.pop(0) if server.script else "ok"
        asked = self.headers.get("Range")
        server.agent = self.headers.get("User-Agent")
        server.seen.append((self.path, asked, self.headers.get("If-Range")))
        if trouble.isdigit():
            return self.reply(int(trouble), b"no")
        if trouble == "redirect":
            return self.reply(302, b"", Location="/signed" + self.path)
        if trouble == "change":
            for path, body in server.files.items():
                server.files[path] = body[::-1]
        body = server.files.get(self.path.removeprefix("/signed"))
        if body is None:
            return self.reply(404, b"no")

        tag = etag(body)
        status = 200
        headers = {"ETag": tag}
        same_file = self.headers.get("If-Range") == tag or trouble == "change"
        if asked and same_file and trouble != "no ranges":
            status = 206
            begin = int(asked.removeprefix("bytes=").removesuffix("-"))
            if begin >= len(body):
                return self.reply(416, b"", **{"Content-Range": f"bytes */{len(body)}"})
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
            body = body[begin:]
        length = len(body)
        if trouble == "drop":
            body = body[:length // 2]
        self.reply(status, body, length, **headers)

    def reply(self, status, body, length=None, **headers):
        self.send_response(status)
        self.send_header("Connection", "close")
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True


def etag(body):
    return f'"{hashlib.sha256(body).hexdigest()}"'


def ignore(*_):
    """Handles the error when a client hangs up, which some tests are about."""


@pytest.fixture
def mirror(monkeypatch):
    """A running server: .url, .files {path: bytes}, .script, and .seen, its requests."""
    monkeypatch.setattr(download, "WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        server.handle_error = ignore
        server.files = {"/file": random.Random(0).randbytes(2**20)}
        server.seen = []
        server.script = []
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("script, n_requests", [
    (["ok"], 1),
    (["drop", "ok"], 2),
    (["drop", "drop", "drop", "ok"], 4),
    (["drop", "no ranges"], 2),
    # the rest of the changed file arrives as if it were the old one's: start over
    (["drop", "change", "ok"], 3),
    (["503", "429", "500", "ok"], 4),
    (["redirect", "drop", "redirect", "ok"], 4),
    (["drop", "416", "ok"], 3),
])
def test_download_survives(mirror, tmp_path, script, n_requests):
    mirror.script[:] = script
    download.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == mirror.files["/file"]
    assert sorted(os.listdir(tmp_path)) == ["file", "file.lock"]
    assert len(mirror.seen) == n_requests
    if script == ["drop", "ok"]:
        # only the rest was requested, and only if it is still the same file
        _, asked, if_range = mirror.seen[1]
        begin = int(asked.removeprefix("bytes=").removesuffix("-"))
        assert 0 < begin <= 2**19 and if_range
    if "redirect" in script:
        # the original URL again, not the one that it redirected to
        assert [path for path, _, _ in mirror.seen] == ["/file", "/signed/file"] * 2


def test_download_resumes_after_a_restart(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    url = f"{mirror.url}/file"
    path = tmp_path / "file"
    mirror.script[:] = ["drop", "500"]
    with pytest.raises(OSError, match="run it again to resume"):
        download.download(url, str(path))
    assert not path.exists()
    assert (tmp_path / "file.part").exists()
    download.download(url, str(path))
    assert path.read_bytes() == mirror.files["/file"]
    assert mirror.seen[-1][1]

    # complete, but killed before it was renamed
    path.rename(tmp_path / "file.part")
    (tmp_path / "file.part.tag").write_text(etag(mirror.files["/file"]))
    download.download(url, str(path))
    assert path.read_bytes() == mirror.files["/file"]
    # a file that exists is not requested
    n = len(mirror.seen)
    download.download(url, str(path))
    assert len(mirror.seen) == n


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_download_fails_at_once(mirror, tmp_path, status):
    mirror.script[:] = [status]
    with pytest.raises(OSError, match=f"HTTP {status}.*mirror"):
        download.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert len(mirror.seen) == 1
    assert os.listdir(tmp_path) == ["file.lock"]


def test_download_gives_up(mirror, tmp_path):
    mirror.script[:] = ["503"] * 100
    with pytest.raises(OSError, match="gave up.*503"):
        download.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert len(mirror.seen) == download.TRIES


def test_download_needs_room(mirror, tmp_path, monkeypatch):
    def disk_usage(path):
        return shutil._ntuple_diskusage(total=10, used=9, free=1)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(OSError, match="free up some space"):
        download.download(f"{mirror.url}/file", str(tmp_path / "file"))


def test_fetch_image(mirror, monkeypatch):
    body = mirror.files["/file"]
    mirror.script[:] = ["redirect"]
    assert download.fetch_image(f"{mirror.url}/file") == body
    mirror.script[:] = ["redirect"] * 5
    with pytest.raises(UserError, match="too many redirects"):
        download.fetch_image(f"{mirror.url}/file")
    mirror.script[:] = ["drop"]
    with pytest.raises(UserError, match="can't be downloaded"):
        download.fetch_image(f"{mirror.url}/file")
    monkeypatch.setattr(download, "IMAGE_BYTES", len(body) - 1)
    with pytest.raises(UserError, match="too large for an image"):
        download.fetch_image(f"{mirror.url}/file")


def test_requests_name_this_program(mirror, tmp_path):
    download.fetch_image(f"{mirror.url}/file")
    assert mirror.agent.startswith("nanoCaption")
    mirror.agent = ""
    download.download(f"{mirror.url}/file", str(tmp_path / "file"))
    assert mirror.agent.startswith("nanoCaption")


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "WEIGHTS", str(tmp_path / "weights"))
    assert download.is_hub_name("gpt2")
    assert download.is_hub_name("openai/clip")
    assert not download.is_hub_name("a/b/c")
    assert not download.is_hub_name("./gpt2")
    # a wrong path into a folder that exists
    (tmp_path / "out").mkdir()
    assert not download.is_hub_name("out")
    assert not download.is_hub_name("out/run")
    # unless it has been downloaded before
    (tmp_path / "weights" / "out" / "run").mkdir(parents=True)
    assert download.is_hub_name("out/run")
