"""Ctrl-C and SIGTERM during training: finish the step, save, exit."""
import contextlib
import glob
import os
import signal
import sys


class StopSignal:
    """
    `number` is 0 until SIGINT or SIGTERM arrives, then the signal's. train.py checks it every step.

    A second signal makes the process exit at once, without saving, and removes its half-written
    files from out_dir. quiet: do not print what the signal does.
    """

    def __init__(self, out_dir, quiet=False):
        self.out_dir = out_dir
        self.quiet = quiet
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        """The signal handler. It uses os.write because print is not reentrant."""
        if self.number:
            # do not raise an exception: inside torch.save, it would abort the process
            for path in glob.glob(f"{glob.escape(str(self.out_dir))}/*.tmp{os.getpid()}"):
                with contextlib.suppress(OSError):
                    os.unlink(path)
            self.write(f"{os.path.basename(sys.argv[0])}: interrupted\n")
            os._exit(128 + number)
        self.number = number
        if not self.quiet:
            self.write("stopping after this step; press Ctrl-C again to quit without saving\n")

    def write(self, text):
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
