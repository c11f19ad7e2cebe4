"""A run with real processes prints no start-up warnings of the libraries, and other machines cannot reach it."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from config_files import write
from rl_runs import environment, torchrun
from tiny_models import make_tiny_model

from megatron_rl.ranks.known_warnings import LOGGED

OURS = re.compile(r"(engine|data|finished): |step \d|(model|metrics|checkpoint|logs|report|train longer) +\S")
SFT = """\
run_dir: run
model: {path: model}
parallel: {tp: 2}
engine: {device: cpu, dtype: fp32, recompute: full}
data: {train: examples.jsonl, max_tokens: 200}
steps: 1
batch_size: 4
"""


def watch(root: int) -> tuple[int, set[str]]:
    """Returns the number of children of a process, and the addresses on which it or a descendant listens."""
    try:
        children, processes = psutil.Process(root).children(), psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess:
        return 0, set()
    found: set[str] = set()
    for process in [psutil.Process(root), *processes]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            found |= {c.laddr.ip for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    return len(children), found


@pytest.mark.distributed
def test_a_run_prints_no_warning_and_listens_only_on_the_loopback_interface(tmp_path: Path) -> None:
    """All process groups of the layout are there; parity and certify start their ranks in the same way."""
    make_tiny_model(tmp_path / "model", num_layers=1)
    write(tmp_path / "sft.yaml", SFT)
    write(tmp_path / "examples.jsonl", '{"prompt": "1+1=", "response": "2"}\n' * 4)
    command = torchrun(2, "-m", "megatron_rl", "sft", "sft.yaml")
    ours = {name: value for name, value in environment().items() if name != "PYTHONWARNINGS"}
    out, err = tmp_path / "stdout", tmp_path / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        launcher = subprocess.Popen(command, cwd=tmp_path, env=ours, stdout=stdout, stderr=stderr)
    ranks = 0
    addresses: set[str] = set()
    while launcher.poll() is None:
        children, listening = watch(launcher.pid)
        ranks, addresses = max(ranks, children), addresses | listening
        time.sleep(0.1)
    said = err.read_text()
    assert launcher.returncode == 0, said[-3000:]
    assert said == "", "nothing of a library's, and no warning of ours"
    lines = out.read_text().splitlines()
    assert [line for line in lines if not OURS.match(line)] == []
    assert [line for line in lines if line.startswith(("step 1/1  loss ", "finished: step 1 of 1"))] == lines[4:6]
    assert lines[-1].endswith("torchrun --nproc-per-node 2 -m megatron_rl sft sft.yaml steps=2 --resume")
    for rank in range(2):
        assert "INFO megatron_rl.lab.console: engine: ready" in (tmp_path / f"run/logs/rank-{rank}.log").read_text()
    logged = "".join(file.read_text() for file in (tmp_path / "run" / "logs").glob("*.log"))
    assert not [text for text in LOGGED.values() if text in logged]
    assert ranks == 2  # they were seen
    assert addresses  # so was their store
    assert all(ipaddress.ip_address(address).is_loopback for address in addresses), addresses
