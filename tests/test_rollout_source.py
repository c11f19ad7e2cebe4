"""Saved rollouts as the source of a run's groups, whatever layout wrote them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_rl.data.sample import Group, Prompt, Sample, VersionSpan
from megatron_rl.data.store import StoreError, write_groups
from megatron_rl.rollout.routes import RouteSpec
from megatron_rl.rollout.sampler import Sampling, _Spread
from megatron_rl.rollout.source import Leader, first_server, rollout_file, saved_groups
from megatron_rl.routing.trace import RoutingTrace

SPEC = RouteSpec(num_layers=2, moe_layers=(0, 1), top_k=2, num_experts=8)


def trace(rows: int = 3, num_experts: int = 8) -> RoutingTrace:
    ids = np.tile([5, 2], (rows, 2, 1))
    spans = (VersionSpan(0, 0, rows),)
    return RoutingTrace.from_ids(ids, layers=(0, 1), num_experts=num_experts, source="rollout", versions=spans)


def group(index: int, *traces: RoutingTrace | None) -> Group:
    prompt = Prompt(f"p{index}", "", (3, 4), "", "")
    samples = (Sample.start(prompt, n).extend([5, 6], [-0.1, -0.2], 0) for n in range(len(traces)))
    return Group(
        index, prompt, tuple(s if t is None else s.with_trace(t) for s, t in zip(samples, traces, strict=True))
    )


def save(run_dir: Path, *shares: list[Group]) -> None:
    for dp, groups in enumerate(shares):
        write_groups(rollout_file(run_dir / "rollouts", 1, dp), groups, weight_version=0)


def test_groups_are_dealt_out_anew(tmp_path: Path) -> None:
    save(tmp_path, [group(3, None), group(0, None)], [group(2, None), group(1, None)])
    assert [g.index for g in saved_groups(tmp_path, 1, 0, 1)] == [0, 1, 2, 3]
    assert [g.index for g in saved_groups(tmp_path, 1, 1, 2)] == [1, 3]
    with pytest.raises(FileNotFoundError, match="has no rollouts of step 2"):
        saved_groups(tmp_path, 2, 0, 1)


def test_traces_come_with_their_samples(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace())], [group(1, trace(), trace())])
    for found in saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC):
        for sample in found.samples:
            assert sample.trace is not None
            assert sample.trace.checksum == trace().checksum


def test_a_sample_without_the_trace_that_is_needed_is_named_with_its_file(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace())], [group(1, trace(), None)])
    assert len(saved_groups(tmp_path, 1, 0, 1)) == 2
    with pytest.raises(StoreError, match=r"step-000001-dp-0001\.jsonl: prompt 'p1' sample 1: trace: none is there"):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC)
    assert len(saved_groups(tmp_path, 1, 0, 2, needs_traces=SPEC)) == 1  # another leader's share


def test_a_trace_of_another_model_is_named_with_its_file(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace(num_experts=9))])
    with pytest.raises(
        StoreError, match=r"dp-0000\.jsonl: prompt 'p0' sample 1: trace: num_experts: found 9; expected 8"
    ):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC)
    with pytest.raises(StoreError, match="top_k: found 2; expected 3"):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=dataclasses.replace(SPEC, top_k=3))


@pytest.mark.parametrize(
    ("leaders", "groups", "servers", "most"),
    [(32, 2, 16, 4), (16, 1, 32, 1), (3, 4, 16, 1), (4, 8, 4, 8), (2, 5, 3, 4)],
)
def test_leaders_that_do_not_know_of_each_other_use_all_servers(
    leaders: int, groups: int, servers: int, most: int
) -> None:
    """32 leaders that all began with the first server sent all of their groups to two of sixteen."""
    urls = [f"http://127.0.0.1:{1000 + n}" for n in range(servers)]
    sampling = Sampling(8, 1, 1.0, concurrency=1000, vocab_size=9, versions=frozenset({0}))
    count = Counter[str]()
    for dp in range(leaders):
        leader = Leader(urls, api_key=None, deadline=1.0, first=first_server(dp, leaders, servers))
        assert sorted(client.url for client in leader.clients) == urls
        spread = _Spread(leader.clients, sampling)
        count.update(spread._home(group).url for group in range(groups))
        leader.close()
    assert max(count.values()) == most
    assert len(count) == min(servers, leaders * groups)
