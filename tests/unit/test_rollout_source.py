"""Saved rollouts of any layout as the source of a run's groups."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.step_files import rollout_file
from megatron_rl.data.store import StoreError, read_groups, write_groups
from megatron_rl.data.top_tokens import TopTokens
from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.errors import MissingFileError
from megatron_rl.rollout.sampler import _Place
from megatron_rl.rollout.source import Leader, Wanted, check_headers, first_server
from megatron_rl.rollout.source import saved_groups as read_saved
from megatron_rl.routing.wire import RouteSpec

SPEC = RouteSpec(num_layers=2, moe_layers=(0, 1), top_k=2, num_experts=8)


def trace(rows: int = 3, num_experts: int = 8) -> RoutingTrace:
    ids = np.tile([5, 2], (rows, 2, 1))
    spans = (VersionSpan(0, 0, rows),)
    return RoutingTrace.from_ids(ids, layers=(0, 1), num_experts=num_experts, source="rollout", versions=spans)


def group(index: int, *traces: RoutingTrace | None) -> Group:
    prompt = Prompt(f"p{index}", "", (3, 4), "", "")
    samples = [Sample.start(prompt, n).extend([5, 6], [-0.1, -0.2], 0) for n in range(len(traces))]
    samples = [dataclasses.replace(sample, verdict=Verdict(1.0, True)) for sample in samples]
    return Group(
        index, prompt, tuple(s if t is None else s.with_trace(t) for s, t in zip(samples, traces, strict=True))
    )


def save(run_dir: Path, *shares: list[Group], **header: Any) -> None:
    for dp, groups in enumerate(shares):
        options = {"weight_version": 0, "temperature": 0.7, "vocab_size": 9, **header}
        write_groups(rollout_file(run_dir / "rollouts", 1, dp), groups, **options)


def saved_groups(run_dir: Path, step: int, share: int, of: int, **options: Any) -> list[Group]:
    """Reads a share of a step, for a run that wants exactly the saved groups."""
    files = sorted((run_dir / "rollouts").glob("*.jsonl"))
    groups = [group for file in files for group in read_groups(file)]
    wanted = Wanted(len(groups), len(groups[0].samples), max_tokens=4, temperature=0.7, vocab_size=9)
    return read_saved(run_dir, step, share, of, wanted=wanted, **options)


def test_saved_groups_are_shared_among_any_number_of_leaders(tmp_path: Path) -> None:
    save(tmp_path, [group(3, None), group(0, None)], [group(2, None), group(1, None)])
    assert [g.index for g in saved_groups(tmp_path, 1, 0, 1)] == [0, 1, 2, 3]
    assert [g.index for g in saved_groups(tmp_path, 1, 1, 2)] == [1, 3]
    with pytest.raises(FileNotFoundError, match="has no rollouts of step 2"):
        saved_groups(tmp_path, 2, 0, 1)


def test_saved_traces_are_read_with_their_samples(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace())], [group(1, trace(), trace())])
    for found in saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC):
        for sample in found.samples:
            assert sample.trace is not None
            assert sample.trace.checksum == trace().checksum


def test_the_error_names_the_file_and_sample_of_a_missing_trace(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace())], [group(1, trace(), None)])
    assert len(saved_groups(tmp_path, 1, 0, 1)) == 2
    with pytest.raises(StoreError, match=r"step-000001-dp-0001\.jsonl: prompt 'p1' sample 1: trace: none is there"):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC)
    assert len(saved_groups(tmp_path, 1, 0, 2, needs_traces=SPEC)) == 1  # another leader's share


def test_the_error_names_the_file_and_sample_of_another_models_trace(tmp_path: Path) -> None:
    save(tmp_path, [group(0, trace(), trace(num_experts=9))])
    with pytest.raises(
        StoreError, match=r"dp-0000\.jsonl: prompt 'p0' sample 1: trace: num_experts: found 9; expected 8"
    ):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=SPEC)
    with pytest.raises(StoreError, match="top_k: found 2; expected 3"):
        saved_groups(tmp_path, 1, 0, 1, needs_traces=dataclasses.replace(SPEC, top_k=3))


# ---- rollouts that do not fit this run ---------------------------------------------------------------------------


def two_by_two() -> list[Group]:
    return [group(0, None, None), group(1, None, None)]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([two_by_two()[:1]], "{file}: 1 groups of 2 samples, but rollout.prompts_per_step is 2"),
        ([[*two_by_two(), group(2, None)]], "{file}: 1 groups of 1 samples and 2 groups of 2 samples, but rollout.pro"),
        ([[group(0, None), group(1, None)]], "{file}: 2 groups of 1 samples, but rollout.group_size is 2"),
        ([two_by_two()[:1], [group(1, *[None] * 3)]], "{file} and 1 more files of its step: 1 groups of 2 samples and"),
        ([[two_by_two()[0]] * 2], "{file}: group 0 is there twice; {file} has it too"),
        ([two_by_two()[:1], two_by_two()[:1]], "{other}: group 0 is there twice; {file} has it too"),
        ([[group(0, None, None), group(3, None, None)]], "{file}: group 1 is missing, and 0 more"),
    ],
)
def test_saved_groups_of_a_different_number_or_size_are_refused(
    tmp_path: Path, shares: list[Any], message: str
) -> None:
    save(tmp_path, *shares)
    file, other = (rollout_file(tmp_path / "rollouts", 1, dp) for dp in (0, 1))
    with pytest.raises(StoreError) as error:
        read_saved(tmp_path, 1, 0, 1, wanted=Wanted(2, 2, max_tokens=4, temperature=0.7, vocab_size=9))
    assert str(error.value).startswith(message.format(file=file, other=other))


@pytest.mark.parametrize(
    ("header", "wanted", "message"),
    [
        ({"weight_version": 1}, {}, "found rollouts of weight version 1, but step 1 trains on version 0"),
        ({}, {"temperature": 1.0}, "log-probs are of temperature 0.7, but rollout.temperature is 1.0"),
        ({}, {"vocab_size": 8}, "the model that sampled it has a vocabulary of 9, but model.path has 8"),
        (
            {"vocab_size": None},
            {"vocab_size": 6},
            "prompt 'p0' sample 0: token 6 is not in the model's vocabulary of 6",
        ),
        ({}, {"max_tokens": 3}, "prompt 'p0' sample 0: 4 tokens, but data.max_prompt_tokens + rollout.max_response_"),
    ],
)
def test_rollouts_of_a_run_with_other_settings_are_refused(
    tmp_path: Path, header: Any, wanted: Any, message: str
) -> None:
    save(tmp_path, two_by_two(), **header)
    asked = Wanted(2, 2, max_tokens=4, temperature=0.7, vocab_size=9)
    with pytest.raises(StoreError) as error:
        read_saved(tmp_path, 1, 0, 1, wanted=dataclasses.replace(asked, **wanted))
    assert str(error.value).startswith(f"{rollout_file(tmp_path / 'rollouts', 1, 0)}: {message}")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_file_of_a_step_that_is_not_there_is_named(tmp_path: Path, lost: int) -> None:
    one, two = two_by_two()
    save(tmp_path, [one], [two], files=2)
    asked = Wanted(2, 2, max_tokens=4, temperature=0.7, vocab_size=9)
    check_headers(tmp_path, 1, asked)
    file = rollout_file(tmp_path / "rollouts", 1, lost)
    file.unlink()
    told = rf"^{file}: not there, but each of the run's 2 data-parallel replicas wrote a file of step 1"
    with pytest.raises(MissingFileError, match=told):
        check_headers(tmp_path, 1, asked)
    with pytest.raises(MissingFileError, match=told):
        read_saved(tmp_path, 1, 0, 1, wanted=asked)


def test_a_gap_between_files_without_their_number_is_named(tmp_path: Path) -> None:
    save(tmp_path, [], [], two_by_two())
    file = rollout_file(tmp_path / "rollouts", 1, 1)
    file.unlink()
    with pytest.raises(MissingFileError, match=rf"^{file}: not there"):
        check_headers(tmp_path, 1, Wanted(2, 2, max_tokens=4, temperature=0.7, vocab_size=9))


def test_fields_missing_from_an_older_header_are_not_checked(tmp_path: Path) -> None:
    save(tmp_path, two_by_two(), temperature=None, vocab_size=None)
    check_headers(tmp_path, 1, Wanted(2, 2, max_tokens=4, temperature=1.0, vocab_size=7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dataclasses.replace(s, verdict=None), "prompt 'p0' sample 0: no verdict"),
        (
            lambda s: dataclasses.replace(Sample.start(Prompt("p0", "", (), "", ""), 0), verdict=s.verdict),
            "prompt 'p0' sample 0: its prompt has no tokens",
        ),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    (sample,) = group(0, None).samples
    changed = change(sample)
    save(tmp_path, [Group(0, changed.prompt, (changed,))])
    with pytest.raises(StoreError, match=message):
        read_saved(tmp_path, 1, 0, 1, wanted=Wanted(1, 1, max_tokens=4, temperature=0.7, vocab_size=9))


@pytest.mark.parametrize(
    ("leaders", "groups", "servers", "most"),
    [(32, 2, 16, 4), (16, 1, 32, 1), (3, 4, 16, 1), (4, 8, 4, 8), (2, 5, 3, 4)],
)
def test_independent_leaders_together_use_all_servers(leaders: int, groups: int, servers: int, most: int) -> None:
    """If 32 leaders all started with the first server, they would send all groups to two of sixteen servers."""
    urls = [f"http://127.0.0.1:{1000 + n}" for n in range(servers)]
    count = Counter[str]()
    for dp in range(leaders):
        leader = Leader(urls, api_key=None, deadline=1.0, first=first_server(dp, leaders, servers))
        assert sorted(client.url for client in leader.clients) == urls
        places = [_Place(leader._fleet, samples=8) for _ in range(groups)]
        count.update(place._live_home().client.url for place in places)
        leader.close()
    assert max(count.values()) == most
    assert len(count) == min(servers, leaders * groups)


def test_saved_likely_tokens_must_be_as_many_as_the_run_needs(tmp_path: Path) -> None:
    plain = group(0, None)
    ids, logprobs = np.array([[8, 1], [6, 2]], dtype=np.int32), np.array([[-1, -2], [-0.2, -3]], dtype=np.float32)
    likely = TopTokens(ids, logprobs)
    save(tmp_path / "with", [dataclasses.replace(plain, samples=(plain.samples[0].with_top_tokens(likely),))])
    save(tmp_path / "without", [plain])

    def read(directory: str, top_k: int, vocab_size: int = 9) -> list[Group]:
        wanted = Wanted(1, 1, max_tokens=4, temperature=0.7, vocab_size=vocab_size, top_k=top_k)
        return read_saved(tmp_path / directory, 1, 0, 1, wanted=wanted)

    (found,) = read("with", 2)
    assert found.samples[0].top_tokens is not None
    np.testing.assert_array_equal(found.samples[0].top_tokens.ids, ids)
    assert read("with", 0)
    assert read("without", 0)
    with pytest.raises(StoreError, match=r"sample 0: top_tokens: none are there; objective\.centering needs"):
        read("without", 2)
    with pytest.raises(StoreError, match=r"top_tokens: 2 for each token, but objective\.centering\.top_k.* is 3;"):
        read("with", 3)
    odd = TopTokens(np.array([[8, 1], [9, 2]], dtype=np.int32), logprobs)
    save(tmp_path / "odd", [dataclasses.replace(plain, samples=(plain.samples[0].with_top_tokens(odd),))])
    with pytest.raises(StoreError, match=r"sample 0: top_tokens: token 1: .*expected ids in \[0, 9\)"):
        read("odd", 2)
