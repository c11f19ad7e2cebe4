"""Runs over two nodes with addresses of their own, started by torchrun; a cable that is cut, a node that is killed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from network_nodes import SECONDS, Node, ended, two_nodes, why_not
from paths import SUPPORT
from rl_runs import environment, save_rollouts, write_config

from megatron_rl.errors import LostRankError
from megatron_rl.lab.run import read_metrics
from megatron_rl.rollout.transport import LOST_SECONDS

WHY_NOT = why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
]
HEARTBEAT = 8.0
KEY = {"SERVER_KEY": "a-key-of-this-test-alone"}
PYTHON = (sys.executable, "-m")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as pair:
        yield pair


class Ranks:
    """A rank on each node, started by torchrun."""

    def __init__(self, nodes: tuple[Node, Node], folder: Path, *words: str) -> None:
        self.folder = folder
        self.metrics = folder / "run" / "metrics.jsonl"
        self.logs = [folder / f"node-{number}.log" for number in range(2)]
        master = ("--master-addr", nodes[0].address, "--master-port", "29417")
        agent = (*PYTHON, "megatron_rl.ranks.torchrun", "--nnodes", "2", "--nproc-per-node", "1", *master)
        self.agents = [
            node.start(
                (*agent, "--node-rank", str(number), "-m", "megatron_rl", "train", folder / "c.yaml", *words),
                {**environment(), **KEY},
                log,
            )
            for number, (node, log) in enumerate(zip(nodes, self.logs, strict=True))
        ]

    def wait_for_lines(self, count: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not self.metrics.exists() or len(read_metrics(self.metrics)) < count:
            assert all(agent.poll() is None for agent in self.agents), self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def told(self) -> str:
        return "\n".join(log.read_text()[-6000:] for log in self.logs)


@pytest.fixture
def replaying(nodes: tuple[Node, Node], tiny_model_dir: Path, tmp_path: Path) -> Ranks:
    """A run on saved rollouts that has begun, and has minutes of work left."""
    steps = 60
    save_rollouts(tiny_model_dir, tmp_path / "saved", steps=steps, prompts=16)
    write_config(tmp_path / "c.yaml", tiny_model_dir, tmp_path / "saved", steps=steps)
    sizes = ("rollout.prompts_per_step=16", f"engine.heartbeat={HEARTBEAT:g}", f"run_dir={tmp_path / 'run'}")
    ranks = Ranks(nodes, tmp_path, *sizes)
    ranks.wait_for_lines(2)
    return ranks


def assert_names_the_lost(ranks: Ranks, number: int, lost: Node, since: float) -> None:
    """The agent of node `number` ends within the deadline, and its rank says once which rank was lost."""
    status = ended(ranks.agents[number], HEARTBEAT + 30.0, ranks.logs[number])
    print(f"node {number} ended after {time.monotonic() - since:.1f} s")
    assert status == LostRankError.status
    errors = [line for line in ranks.logs[number].read_text().splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    assert f"rank {1 - number} on host {lost.address}" in errors[0]
    assert "--resume" in errors[0]
    assert "Traceback" not in ranks.logs[number].read_text()


def test_a_cut_cable_ends_both_nodes_with_one_message_each(nodes: tuple[Node, Node], replaying: Ranks) -> None:
    since = time.monotonic()
    nodes[1].cut()
    for number in (0, 1):
        assert_names_the_lost(replaying, number, nodes[1 - number], since)


def test_a_killed_node_ends_the_other_with_one_message(nodes: tuple[Node, Node], replaying: Ranks) -> None:
    since = time.monotonic()
    nodes[1].kill()
    assert_names_the_lost(replaying, 0, nodes[1], since)


@pytest.mark.server
def test_servers_of_the_other_node_sample_until_its_cable_is_cut(
    nodes: tuple[Node, Node], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """The first run, with a rank on each node, ends well. In the second the node of the server, and of no rank, is cut
    off: the trainer notices in three probes of the server, or in a weight sync within weights.timeout, and then does
    not wait for the server to leave the weight group."""
    write_config(tmp_path / "c.yaml", tiny_model_dir, tmp_path / "unused", preset="grpo")
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "{n}+1=", "answer": "0"}}\n' for n in range(2000)))
    serve = ("megatron_rl", "serve", tiny_model_dir, "--host", nodes[1].address, "--port", "30000", "--dtype", "fp32")
    flags = ("--max-total-tokens", "8192", "--threads", "1", "--api-key-env", "SERVER_KEY")
    nodes[1].start((*PYTHON, *serve, *flags), {**environment(), **KEY}, tmp_path / "server.log")
    url = f"http://{nodes[1].address}:30000"
    data = (f"data.train={tmp_path / 'prompts.jsonl'}", "data.verifier=verifier_examples:longer")
    servers = (f"rollout.servers.urls=[{url}]", "rollout.servers.api_key_env=SERVER_KEY", "rollout.replay_from=null")
    words = (*data, *servers, f"run_dir={tmp_path / 'run'}")
    ranks = Ranks(nodes, tmp_path, *words)
    for agent, log in zip(ranks.agents, ranks.logs, strict=True):
        assert ended(agent, SECONDS, log) == 0, ranks.told()
    assert len(read_metrics(ranks.metrics)) == 2 * 4

    log = tmp_path / "alone.log"
    longer = ("train.steps=400", "rollout.max_response_tokens=200", "weights.timeout=20")
    alone = (*words[:-1], f"run_dir={tmp_path / 'alone'}", *longer)
    trainer = nodes[0].start(
        (*PYTHON, "megatron_rl", "train", tmp_path / "c.yaml", *alone), {**environment(), **KEY}, log
    )
    deadline = time.monotonic() + SECONDS
    while "step 1/400" not in log.read_text():
        assert trainer.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.05)
    since = time.monotonic()
    nodes[1].cut()
    assert ended(trainer, 95.0, log) == 2, log.read_text()[-6000:]
    print(f"the trainer ended after {time.monotonic() - since:.1f} s")
    errors = [line for line in log.read_text().splitlines() if "error: " in line]
    assert len(errors) == 1, errors
    assert url in errors[0]


def test_requests_end_a_minute_after_the_cable_of_their_server_was_cut(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """One was sent before the cut, and one after it on a connection that was open. In a weight sync nobody asks for
    signs of life, so otherwise they would last until weights.timeout."""
    script, cut, log = SUPPORT / "cut_requests.py", tmp_path / "cut", tmp_path / "log"
    nodes[1].start((sys.executable, script, "serve", nodes[1].address, "30000"), environment(), tmp_path / "server.log")
    url = f"http://{nodes[1].address}:30000"
    asking = nodes[0].start((sys.executable, script, "ask", url, cut), environment(), log)
    deadline = time.monotonic() + SECONDS
    while "ready" not in log.read_text():
        assert asking.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    nodes[1].cut()
    cut.touch()
    assert ended(asking, LOST_SECONDS + 30.0, log) == 0, log.read_text()
    print("requests ended after", log.read_text().splitlines()[-1])
