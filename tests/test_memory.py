"""Test of nanocaption/memory.py."""
import os
import platform
import subprocess
import sys

import pytest

from helpers import HERE

# page faults, of 4 KB each, in the last of several steps that all need the same 94 MB
CODE = """
import resource
import torch
from nanocaption.memory import keep_freed_memory
{call}
for step in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(n * 2**19) for n in range(1, 10)]
    del activations
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused():
    # without the call, all memory is returned at once
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    faults = {}
    for call in ("", "keep_freed_memory()"):
        command = [sys.executable, "-c", CODE.format(call=call)]
        output = subprocess.check_output(command, cwd=HERE, env=environment, text=True)
        faults[call] = int(output)
    assert faults["keep_freed_memory()"] < 100 < faults[""], faults
