"""Downloads: images by URL, large files (resumable), and models on the Hugging Face hub."""
import contextlib
import os
import re
import shutil
import sys
import threading
import time
import urllib.parse

from nanocaption.cli import ROOT, UserError, atomic_write, lock_file, show_progress

# HF_ENDPOINT sets a mirror, as in Hugging Face's own programs
HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
WEIGHTS = os.path.join(ROOT, "data", "weights")  # where models from the hub are kept
IMAGE_BYTES = 2**27  # the largest image file that is accepted
IMAGE_SECONDS = 60  # to download an image
USER_AGENT = "nanoCaption"  # some servers refuse the default of requests
TRIES = 5  # attempts in a row that receive nothing new, before giving up
WAIT = 2.0  # seconds before the next attempt, doubled for each that received nothing new


def is_url(text):
    """Whether a text is an http(s) URL."""
    return re.match("https?://", text, re.IGNORECASE) is not None


# ------------------------------------------------------------------------------------------------
# images


def fetch_image(url):
    """
    The bytes of an image file at an http(s) URL. Raises UserError if it can't be downloaded, is too
    large or takes too long.
    """
    result = []
    # in a thread, because no socket timeout stops a server that sends a byte now and then
    thread = threading.Thread(target=fetch_into, args=(url, result), daemon=True)
    thread.start()
    thread.join(IMAGE_SECONDS)
    if not result:
        raise UserError(
            f"{url}: timed out after {IMAGE_SECONDS} s; download it yourself and pass the file"
        )
    if isinstance(result[0], Exception):
        reason = " ".join(str(result[0]).split())
        raise UserError(f"{url}: can't be downloaded ({reason})")
    return result[0]


def fetch_into(url, result):
    """Appends the bytes at url, or the exception, to the list `result`."""
    try:
        result.append(fetch_bytes(url))
    except Exception as error:
        # a hostile answer can make the libraries raise anything
        result.append(error)


def fetch_bytes(url):
    """The bytes at url, after up to 4 redirects."""
    import requests
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    for _ in range(5):
        with requests.get(
            url, headers=headers, stream=True, timeout=10, allow_redirects=False
        ) as reply:
            if reply.is_redirect:
                url = urllib.parse.urljoin(url, reply.headers["location"])
                continue
            reply.raise_for_status()
            data = bytearray()
            for block in reply.iter_content(2**16):
                data += block
                if len(data) > IMAGE_BYTES:
                    raise ValueError(f"more than {IMAGE_BYTES >> 20} MB, too large for an image")
            return bytes(data)
    raise ValueError("too many redirects")


# ------------------------------------------------------------------------------------------------
# large files


def is_hub_name(source):
    """
    Whether source means a model on the hub: it looks like OWNER/NAME or NAME, does not exist as a
    path, and is not a mistyped path into an existing folder.
    """
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source) or os.path.exists(source):
        return False
    if os.path.isdir(f"{WEIGHTS}/{source}"):
        return True
    return not os.path.exists(source.split("/")[0])


def fetch_hub_file(source, path):
    """Downloads a file of a model on the hub. Returns False if it has none of that name."""
    url = f"{HUB}/{source}/resolve/main/{os.path.basename(path)}"
    try:
        download(url, str(path), os.environ.get("HF_TOKEN"))
    except OSError as error:
        if getattr(error, "status", None) == 404:
            return False
        raise
    return True


def check_no_pointer(path):
    """Raises UserError if a file is git-lfs's pointer to a large file."""
    with open(path, "rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is only a git-lfs pointer to the file; run git lfs pull in its "
                        "folder, or download it again")


def download(url, path, token=None):
    """
    Downloads url to path, which appears only once it is complete. Does nothing if path exists.
    token is sent to the host of url only.

    The bytes go to path.part, their ETag (or Last-Modified) to path.part.tag. After a broken
    connection or a restart, only the rest is requested (Range and If-Range, RFC 9110), always from
    the original URL, because redirects may expire. Raises OSError after TRIES attempts in a row
    without progress, or at once for an HTTP status that a retry won't change.
    """
    with open(f"{path}.lock", "wb") as file:
        # if several processes want the file, one downloads it
        lock_file(file, wait=True)
        if not os.path.exists(path):
            transfer(url, path, token)


def transfer(url, path, token):
    """Downloads url to path, trying again after failures; see download."""
    import requests
    retryable = (
        ConnectionError,
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    )
    part = f"{path}.part"
    failures = 0
    largest = 0
    while True:
        try:
            request(url, part, token)
            break
        except retryable as error:
            size = file_size(part)
            if size > largest:
                largest = size
                failures = 0
            else:
                failures += 1
            # requests wraps the reason in long texts
            reason = getattr(error.args[0], "reason", error) if error.args else error
            if failures == TRIES:
                raise OSError(f"{url}: gave up ({reason}); run it again to resume") from None
            pause = WAIT * 2**failures
            name = os.path.basename(path)
            print(f"{name}: {reason}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    os.replace(part, path)
    remove(f"{part}.tag")


def request(url, part, token):
    """One attempt: requests what is missing from part and appends it."""
    import requests
    have = 0
    # lengths and ranges must be those of the file, not of a compressed stream
    headers = {"Accept-Encoding": "identity", "User-Agent": USER_AGENT}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if os.path.exists(part) and os.path.exists(f"{part}.tag"):
        have = os.path.getsize(part)
        with open(f"{part}.tag", encoding="latin-1") as file:
            headers["If-Range"] = file.read()
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
        receive(reply, url, part, have, headers.get("If-Range"))


def receive(reply, url, part, have, have_tag):
    """
    Appends the body of a reply to part. have: the number of bytes in it, have_tag: the tag of the
    file that they are from. Raises ConnectionError if another attempt may help.
    """
    status = reply.status_code
    content_range = reply.headers.get("Content-Range", "")
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", content_range)
    if status == 416 and span and int(span[2]) == have:
        return  # an earlier attempt received everything but did not rename the file
    if status in (408, 425, 429) or status >= 500:
        raise ConnectionError(f"HTTP {status} {reply.reason}")
    if status not in (200, 206, 416):
        raise refused(reply, url, part)

    tag = reply.headers.get("ETag", "W/")
    if tag.startswith("W/"):
        # If-Range takes no weak ETag
        tag = reply.headers.get("Last-Modified", "")
    is_rest = status == 206 and span and span[1] == str(have) and tag in ("", have_tag)
    if not is_rest:
        remove(f"{part}.tag")
        if status != 200:
            raise ConnectionError("the file has changed; starting over")
        have = 0
        with open(part, "wb"):
            pass  # emptied

    length = int(reply.headers.get("Content-Length", 0))  # 0: unknown
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(part))).free
    if length > free:
        raise OSError(
            f"{url}: needs {length / 1e9:.1f} GB, but only {free / 1e9:.1f} GB is free; "
            "free up some space"
        )
    if tag:
        with atomic_write(f"{part}.tag") as file:
            file.write(tag.encode("latin-1"))
    start = time.monotonic()
    size = have
    total = have + length
    name = os.path.basename(part)
    with open(part, "ab") as file:
        for block in reply.iter_content(2**16):
            size += file.write(block)
            show_progress(f"{name}: MB", size, max(total, size), start, first=have, unit=10**6)
        file.flush()
        os.fsync(file.fileno())
    if length and size != total:
        raise ConnectionError(f"received {size:,} of {total:,} bytes")


def refused(reply, url, part):
    """The OSError (with .status) for an HTTP status that a retry won't change."""
    status = reply.status_code
    path = part.removesuffix(".part")
    hint = f"use a mirror or put the file at {path} yourself"
    if status in (401, 403):
        hint = f"if it needs a login, set HF_TOKEN to your access token; otherwise {hint}"
    error = OSError(f"{url}: HTTP {status} {reply.reason}; {hint}")
    error.status = status
    return error


def file_size(path):
    """The size of a file in bytes; 0 if there is no such file."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def remove(path):
    """Removes a file if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
