"""What all scripts share: options, one-line errors, atomic files, folder locks and progress."""
import argparse
import contextlib
import difflib
import errno
import glob
import os
import re
import signal
import sys
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUNDLED = os.path.join(ROOT, "out", "flickr8k")  # the bundled checkpoint
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A user's mistake, described in one line: run() prints it and exits with code 2."""


def one_line(text):
    """Escapes line breaks and other control characters, which file names may contain."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", escape, text)


def escape(match):
    """A matched character -> its escape sequence, such as \\n."""
    return repr(match[0])[1:-1]


def expand_user(text):
    """Replaces ~ with the home folder where a path begins: in PATH, --NAME=PATH or SPLIT=PATH."""
    prefix, path = re.fullmatch(r"((?:[\w-]+=)*)(.*)", text, re.DOTALL).groups()
    return prefix + os.path.expanduser(path)


class Parser(argparse.ArgumentParser):
    """
    argparse without abbreviations, with ~ for the home folder. Errors are one line and suggest the
    closest option.
    """

    def __init__(self, **options):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )

    def parse_args(self, args=None, namespace=None):
        """Expands ~ first, which the shell leaves as it is in --out_dir=~/x and in quotes."""
        args = sys.argv[1:] if args is None else args
        return super().parse_args([expand_user(text) for text in args], namespace)

    def error(self, message):
        """Prints the error and exits with code 2."""
        hint = "see --help"
        unknown = re.search(r"unrecognized arguments:.*?(-[^\s=]+)", message)
        if unknown:
            options = list(self._option_string_actions)
            close = difflib.get_close_matches(unknown[1], options, n=1, cutoff=0.5)
            if close:
                hint = f"did you mean {close[0]}?"
        self.exit(2, f"{self.prog}: error: {one_line(message)} ({hint})\n")


def check_output(option, path, inputs):
    """Raises UserError if path, an output file that option names, is one of the input files."""
    for source in inputs:
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise UserError(f"{option} {path} would overwrite an input file; choose another name")


def check_ranges(options, **ranges):
    """
    Raises UserError unless each named attribute of options is None or within its (low, high).
    NaN is outside every range.
    """
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} must be between {low:.12g} and {high:.12g}, not {value}")


def run(main):
    """
    Calls main(). Failures become one line on stderr and an exit code: 2 for a UserError or a path
    that cannot be opened; 1 for another OSError, an ArithmeticError or running out of memory; 130
    for Ctrl-C; 141 for a closed pipe, without a line.
    """
    # a printed file name may contain anything
    sys.stdout.reconfigure(errors="backslashreplace")
    signal.signal(signal.SIGINT, interrupt_once)
    try:
        main()
        sys.stdout.flush()
        return
    except KeyboardInterrupt:
        code = 130
        message = "interrupted"
    except UserError as error:
        code = 2
        message = f"error: {error}"
    except BrokenPipeError:
        # the reader of our output, such as head, has what it wants
        code = 141
        message = None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        code = 2
        path = error.filename2 or error.filename
        # not the name of a temporary file that atomic_write could not create
        path = re.sub(r"\.tmp[0-9]+$", "", str(path)) if path else ""
        message = f"error: {path}: {error.strerror}" if path else f"error: {error}"
    except (OSError, ArithmeticError) as error:
        code = 1
        message = f"error: {error}"
        if getattr(error, "errno", None) in NO_SPACE:
            message += "; free up some space, then run the same command again"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        code = 1
        message = f"error: out of memory; try a smaller batch size or image size ({error})"
    if message:
        message = one_line(" ".join(message.split()))
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # full disk or closed pipe: without this, Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def interrupt_once(signum, frame):
    """A signal handler: later signals are ignored so that they don't interrupt the cleanup."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def is_out_of_memory(error):
    """Whether an exception, Python's or torch's, means that memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return bool(re.search("out of memory|can't allocate memory", str(error)))


@contextlib.contextmanager
def atomic_write(path):
    """
    A binary file to write to. It appears at path only once it is complete and on disk; after an
    error, nothing is left behind.
    """
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
        # torch.save hides the exception that made it fail
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        # Pillow raises an OSError that has only a message
        if isinstance(cause, OSError) and cause.errno is not None and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def lock_folder(folder):
    """
    Reserves folder for this process until the returned file is closed, and deletes partial files
    that killed processes left there. Raises UserError if another process is using the folder.
    """
    file = open(f"{folder}/.lock", "wb")
    try:
        lock_file(file, wait=False)
    except BlockingIOError:
        raise UserError(
            f"another process is using {folder}; wait for it or choose another --out_dir"
        ) from None
    for path in glob.glob(f"{glob.escape(str(folder))}/*.tmp[0-9]*"):
        os.remove(path)
    return file


def lock_file(file, wait):
    """
    Locks an open file until it is closed, if the system supports it. Raises BlockingIOError if
    another process holds the lock and wait is False.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # the file system has no locks


def show_progress(what, done, total, start, first=0, unit=1):
    """
    Prints a progress line on stderr: rewritten in place on a terminal, else every ten seconds.

    start: the value of time.monotonic() when `first` were done. Counts are shown in multiples of
    `unit`.
    """
    now = time.monotonic()
    terminal = sys.stderr.isatty()
    interval = 0.2 if terminal else 10
    too_soon = now - max(show_progress.last, start) < interval
    is_last_line = terminal and done == total
    if too_soon and not is_last_line:
        return
    show_progress.last = now
    rate = max(done - first, 1) / max(now - start, 1e-3)
    line = (
        f"{what} {done / unit:,.0f} / {total / unit:,.0f}, {rate / unit:,.0f} per second, "
        f"{(total - done) / rate:,.0f} seconds left"
    )
    if terminal:
        line = f"\r{line:79}"
    end = "" if terminal and done < total else "\n"
    print(line, end=end, file=sys.stderr, flush=True)


show_progress.last = 0.0  # when the last line was printed
