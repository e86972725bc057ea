"""Test of nanocaption/memory.py."""
import subprocess
import sys

import pytest

from helpers import HERE

# page faults while 16 MB are freed and allocated again, 4,096 pages of 4 KB
CODE = """
import resource
import torch
from nanocaption.memory import keep_freed_memory
{call}
torch.ones(2**22)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**22)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")
def test_freed_memory_is_reused():
    faults = {}
    for call in ("", "keep_freed_memory()"):
        command = [sys.executable, "-c", CODE.format(call=call)]
        faults[call] = int(subprocess.check_output(command, cwd=HERE, text=True))
    assert faults["keep_freed_memory()"] < 100 < faults[""]
