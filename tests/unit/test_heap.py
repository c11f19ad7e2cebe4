"""Memory that a process on a CPU has freed is used again, and the kernel makes no new pages for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs glibc")

PAGES_OF_THE_LAST = """
import resource
import torch
{before}
def faults():
    torch.empty(10 * 2**20).fill_(1.0)  # 40 MiB: more than malloc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
found = [faults() for _ in range(40)]  # the first ones may take different places
print(found[-1] - found[-11])
"""


def pages(before: str) -> int:
    """Pages that the kernel makes for the last 10 of 40 tensors, one after the other: 102400, or 200 large ones."""
    code = PAGES_OF_THE_LAST.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_a_process_on_a_cpu_keeps_what_it_has_freed() -> None:
    assert pages("") > 100
    assert pages("from megatron_rl.engine.device import use_device\nuse_device('cpu')") < 10


def test_a_server_on_a_cpu_keeps_what_it_has_freed() -> None:
    """The module does this when it is run, and then starts SGLang; here nothing is started."""
    before = (
        "import runpy, megatron_rl.rollout.sglang_launch as launch\n"
        "launch.launch = lambda arguments: None\n"
        "runpy.run_module('megatron_rl.rollout.sglang_cpu', run_name='__main__')"
    )
    assert pages(before) < 10


ROOMS = """
import re
from pathlib import Path
from megatron_rl.heap import keep_freed_memory
from megatron_rl.rollout.sglang_cpu_weights import _free_room, _rooms
keep_freed_memory()
def kibibytes():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = kibibytes()
for number in range(20):
    _free_room((number + 1) * 2**22).fill_(1)
    _rooms.reverse()
print(kibibytes() - before)
"""


def test_a_servers_rooms_for_weights_take_no_more_than_two_buckets() -> None:
    """Each of 20 buckets is 4 MiB larger than the one before, so its room is new; the last two have 76 and 80 MiB."""
    done = subprocess.run([sys.executable, "-c", ROOMS], capture_output=True, text=True, check=True)
    assert 150 < int(done.stdout) / 1024 < 170
