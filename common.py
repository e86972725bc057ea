"""What every script shares: one line for a user's mistake, files that are whole or not there, progress, downloads."""
import argparse
import contextlib
import difflib
import errno
import glob
import os
import re
import shutil
import signal
import sys
import threading
import time
import urllib.parse


def uncaught(kind, error, trace):
    """Python's last resort: an interrupt, which may come while a script is still importing, is one line here too, and exit code 130."""
    if issubclass(kind, KeyboardInterrupt) and not hasattr(sys, "ps1"):  # which an interactive Python has
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(f"{os.path.basename(sys.argv[0])}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.__excepthook__(kind, error, trace)


sys.excepthook = uncaught  # before what takes long to import

import requests  # noqa: E402

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = os.path.dirname(os.path.abspath(__file__))
PUBLISHED = os.path.join(HERE, "out", "flickr8k")  # the captioner that comes along
HUB, WEIGHTS = "https://huggingface.co", os.path.join(HERE, "data", "weights")  # other people's models: where they are, where we keep them
PICTURE_BYTES, PICTURE_SECONDS = 2 ** 27, 60  # more than any picture's file has, and than its download may take
TRIES, WAIT = 8, 2.0  # a download's tries that get no further, and seconds before the second (then twice as many ...)


class UserError(ValueError):
    """A mistake of the user's, said in one line; run() prints it and exits with 2."""


def one_line(text):
    """Line ends and other control characters, which a file's name may have, become \\n and the like."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line that names the nearest right option."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        wrong = re.search(r"unrecognized arguments:.*?(-[^\s=]+)", message)
        near = wrong and difflib.get_close_matches(wrong[1], self._option_string_actions, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else " (--help lists the options)"
        self.exit(2, f"{self.prog}: error: {one_line(message)}{hint}\n")


def check_ranges(options, **ranges):
    """ranges: name=(lowest, highest) for attributes of options that are numbers or None; UserError for what lies outside, as NaN does."""
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be from {low:g} to {high:g}, not {value}")


def interrupt(number, frame):
    """A handler of signals that interrupts once: what comes after it would only interrupt the clearing up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def run(main):
    """Calls main(). A UserError ends in one line on stderr and exit code 2, an OSError (disk full, no network), an ArithmeticError or
    memory that runs out in one line and 1, an interrupt in one line and 130."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a picture's name may be anything
    signal.signal(signal.SIGINT, interrupt)
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        message, code = f"error: {error}", 2
    except (OSError, ArithmeticError) as error:
        message, code = f"error: {error}", 1
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += ": make room, then give the same command again"
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|can't allocate memory", str(error)):
            raise
        message, code = f"error: out of memory: take smaller batches or pictures ({error})", 1
    print(f"{os.path.basename(sys.argv[0])}: {one_line(' '.join(message.split()))}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a full disk, a pipe whose reader has gone: at exit it would fail once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


@contextlib.contextmanager
def atomic_write(path):
    """Yields a binary file that takes path's name only once it is whole and on disk; after an error nothing is left."""
    temporary = f"{path}.tmp{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save hides why a write failed or ended
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        if isinstance(cause, OSError) and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def exclusive(folder):
    """
    Keeps folder for the caller until the file that is returned is closed, and removes what a killed process left half-written there.
    UserError where another process has it.
    """
    file = open(f"{folder}/.lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is at work in {folder}: wait for it, or name another --out_dir") from None
    except OSError:
        pass  # a file system that has no locks
    for left in glob.glob(f"{glob.escape(str(folder))}/*.tmp[0-9]*"):
        os.remove(left)
    return file


def progress(what, done, total, began, first=0, unit=1):
    """A line on stderr, rewritten in place on a terminal, elsewhere one in ten seconds. first: done at began."""
    terminal, now = sys.stderr.isatty(), time.monotonic()
    if now - max(progress.last, began) < (0.2 if terminal else 10) and not (terminal and done == total):
        return
    progress.last = now
    rate = max(done - first, 1) / max(now - began, 1e-3)
    line = (f"{what} {done / unit:,.0f} / {total / unit:,.0f}, {rate / unit:,.0f} a second, "
            f"{(total - done) / rate:,.0f} seconds left")
    end = "" if terminal and done < total else "\n"
    print(f"\r{line:79}" if terminal else line, end=end, file=sys.stderr, flush=True)


progress.last = 0.0


def fetch(url):
    """A picture's http(s) address -> its bytes. UserError where they can't be had, are too many or too slow to come."""
    found = []
    thread = threading.Thread(target=lambda: found.append(fetch_now(url)), daemon=True)  # a server may drip: no timeout of a socket ends that
    thread.start()
    thread.join(PICTURE_SECONDS)
    if not found:
        raise UserError(f"{url}: not here after {PICTURE_SECONDS} seconds: fetch it yourself, then give the file")
    if isinstance(found[0], Exception):
        raise UserError(f"{url}: can't be fetched: {' '.join(str(found[0]).split())}")
    return found[0]


def fetch_now(url):
    """What fetch waits for: the bytes, or the exception."""
    try:
        for _ in range(5):
            with requests.get(url, stream=True, timeout=10, allow_redirects=False, headers={"Accept-Encoding": "identity"}) as reply:
                if reply.is_redirect:
                    url = urllib.parse.urljoin(url, reply.headers["location"])
                    continue
                reply.raise_for_status()
                data = bytearray()
                for block in reply.iter_content(1 << 16):
                    data += block
                    if len(data) > PICTURE_BYTES:
                        raise ValueError(f"more than {PICTURE_BYTES >> 20} MB, no picture's file is so large")
                return bytes(data)
        raise ValueError("redirects on and on")
    except Exception as error:  # also what a hostile answer makes of the libraries
        return error


def on_hub(source):
    """Whether source, OWNER/NAME or NAME, is taken for a name on the hub: no path that exists, nor a wrong one into a folder that does."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source)) and not os.path.exists(source) and (
        os.path.isdir(f"{WEIGHTS}/{source}") or not os.path.exists(source.split("/")[0]))


def download(url, path, token=None):
    """Fetches url into path, which appears only once it is whole; a path that exists is kept. token: sent to url's host alone.

    The bytes go to path.part, their ETag (or Last-Modified) to path.part.tag. After a broken connection or a restart
    the rest is asked for, from the original address (what it redirects to may expire), if the file is still the same
    (Range and If-Range, RFC 9110). After TRIES tries that get no further, or a status that waiting won't change, an
    OSError.
    """
    with open(f"{path}.lock", "w") as file:  # of several processes that want it, one fetches it
        if fcntl:
            with contextlib.suppress(OSError):  # a file system that has no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        transfer(url, path, token)


def transfer(url, path, token):
    """What download does, alone with the file."""
    part, tag, failures, best = f"{path}.part", f"{path}.part.tag", 0, 0
    while not os.path.exists(path):
        have, headers = 0, {"Accept-Encoding": "identity"}  # lengths and ranges shall be the file's own
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if os.path.exists(part) and os.path.exists(tag):
            with open(tag, encoding="latin-1") as file:
                have, headers["If-Range"] = os.path.getsize(part), file.read()
            headers["Range"] = f"bytes={have}-"
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as reply:
                receive(reply, url, part, tag, have, headers.get("If-Range"))
            os.replace(part, path)
            with contextlib.suppress(FileNotFoundError):
                os.remove(tag)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            size = os.path.getsize(part) if os.path.exists(part) else 0
            best, failures = max(best, size), 0 if size > best else failures + 1
            if failures == TRIES:
                raise OSError(f"{url}: gave up ({error}); what came is kept, run it again to go on") from None
            pause = min(WAIT * 2 ** failures, 60)
            print(f"{os.path.basename(path)}: {error}; trying again in {pause:.0f} seconds", file=sys.stderr)
            time.sleep(pause)


def receive(reply, url, part, tag, have, same):
    """Writes one reply's body behind the `have` bytes of part; `same` is the tag of the file that they came from."""
    status, etag = reply.status_code, reply.headers.get("ETag", "W/")
    validator = reply.headers.get("Last-Modified", "") if etag.startswith("W/") else etag  # If-Range takes no weak ETag
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", reply.headers.get("Content-Range", ""))
    if status == 416 and span and int(span[2]) == have:
        return  # the last try ended between the last byte and the new name
    if status in (408, 425, 429) or status >= 500:
        raise requests.ConnectionError(f"HTTP {status} {reply.reason}")
    if status not in (200, 206, 416):
        hint = "if it needs a login, set HF_TOKEN to your access token; " if status in (401, 403) else ""
        error = OSError(f"{url}: HTTP {status} {reply.reason}: {hint}else take a mirror, or put the file at "
                        f"{part.removesuffix('.part')} yourself")
        error.status = status
        raise error
    goes_on = status == 206 and span and span[1] == str(have) and validator in ("", same)
    if not goes_on:
        with contextlib.suppress(FileNotFoundError):
            os.remove(tag)
        if status != 200:
            raise requests.ConnectionError("the file has changed, so from the beginning")
        have = 0
        open(part, "wb").close()
    length = int(reply.headers.get("Content-Length", 0))  # 0: not told
    free = shutil.disk_usage(os.path.dirname(os.path.abspath(part))).free
    if length > free:
        raise OSError(f"{url}: {length / 1e9:.1f} GB to come, {free / 1e9:.1f} GB free: make room")
    if validator:
        with atomic_write(tag) as file:
            file.write(validator.encode("latin-1"))
    began, size, total = time.monotonic(), have, have + length
    with open(part, "ab") as file:
        for block in reply.iter_content(1 << 16):
            size += file.write(block)
            progress(f"{os.path.basename(part)}: MB", size, max(total, size), began, have, 10 ** 6)
        file.flush()
        os.fsync(file.fileno())
    if length and size != total:
        raise requests.ConnectionError(f"{size:,} of {total:,} bytes came")
