"""Samples of several turns from a real server: tokens, masks, log-probs and routes are those of one pass over the whole
history."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sampled_groups
import torch
from fault_proxy import Fault, FaultProxy
from tiny_models import VOCAB_SIZE, make_tokenizer
from transformers import AutoModelForCausalLM

from megatron_rl.config.schema import RewardConfig
from megatron_rl.data.sample import Group, Prompt, Sample, Verdict
from megatron_rl.data.store import read_groups, write_groups
from megatron_rl.data.versions import Versions
from megatron_rl.environments.dialogue import PlainDialogue
from megatron_rl.environments.env import EnvError
from megatron_rl.environments.episodes import Environments
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rollout.sampler import Sampling
from megatron_rl.rollout.turns import MultiTurn
from megatron_rl.routing.wire import RouteSpec

pytestmark = pytest.mark.server
TOKENIZER = make_tokenizer()
MARGIN = 1e-4
"""Largest difference of router logits at which two fp32 engines may choose different experts."""


class Short(PlainDialogue):
    """A random model rarely ends its message; every digit does so too."""

    stop_token_ids = tuple(range(2, 12))


def prompts(answer: str = "", count: int = 3) -> list[tuple[int, Prompt]]:
    return [(n, Prompt(f"p{n}", f"say {n} of {count}", (), answer, "arithmetic")) for n in range(count)]


@pytest.fixture(scope="module")
def environments() -> Iterator[Callable[[str], Environments]]:
    """Makes an environment of tests/support/turn_environments.py."""
    made: list[Environments] = []

    def make(name: str, timeout: float = 60.0) -> Environments:
        made.append(Environments(f"turn_environments:{name}", RewardConfig(timeout=timeout)))
        made[-1].wait_until_ready()
        return made[-1]

    yield make
    for each in made:
        each.close()


def sampling(environments: Environments, model_dir: Path | None = None, /, **changes: int) -> Sampling:
    limits = {"max_turns": 8, "max_prompt_tokens": 40}
    turns = MultiTurn(environments, Short(TOKENIZER), **{**limits, **{k: v for k, v in changes.items() if k in limits}})
    return Sampling(
        samples=4,
        max_response_tokens=changes.get("max_response_tokens", 300),
        temperature=1.0,
        vocab_size=VOCAB_SIZE,
        versions=Versions(0),
        seed=0,
        routes=None if model_dir is None else RouteSpec.of(read_architecture(model_dir)),
        top_k=0 if model_dir is None else 5,
        turns=turns,
    )


def collect(url: str, sampling: Sampling, *faults: Fault, servers: int = 1) -> tuple[list[Group], list[FaultProxy]]:
    proxies = [FaultProxy(url, *(faults if n == 0 else ())) for n in range(servers)]
    return sampled_groups.collect(proxies, prompts(), sampling, 16), proxies


def samples(groups: list[Group]) -> list[Sample]:
    return [sample for group in groups for sample in group.samples]


def turns_of(sample: Sample) -> list[tuple[bool, str]]:
    """(whether the policy spoke, text) of each part of the response."""
    mask = sample.loss_mask[len(sample.prompt.token_ids) :]
    parts = np.split(sample.response_ids, np.flatnonzero(np.diff(mask.astype(int))) + 1)
    spoke = [bool(mask[0]) ^ bool(n % 2) for n in range(len(parts))]
    return [(who, TOKENIZER.decode(part.tolist(), skip_special_tokens=True)) for who, part in zip(spoke, parts)]  # noqa: B905


def test_log_probs_masks_and_routes_equal_those_of_one_pass_over_the_whole_history(
    routed_url: str, routed_model_dir: Path, environments: Callable[[str], Environments], tmp_path: Path
) -> None:
    groups, _ = collect(routed_url, sampling(environments("Adding"), routed_model_dir))
    model = AutoModelForCausalLM.from_pretrained(routed_model_dir, dtype=torch.float32, attn_implementation="eager")
    compared = routed = 0
    for sample in samples(groups):
        assert sample.finish_reason == "stop"
        assert sample.turns == 3
        ids = torch.tensor([sample.token_ids.tolist()])
        with torch.no_grad():
            found = model(ids, output_router_logits=True)
        logprobs = found.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
        mask = sample.loss_mask[1:]
        np.testing.assert_allclose(sample.rollout_logprobs[1:][mask], logprobs[mask], atol=2e-5)
        assert (sample.rollout_logprobs[1:][~mask] == 0).all()
        trace = sample.trace
        assert trace is not None
        assert trace.rows == len(sample.token_ids) - 1
        assert trace.present.all()
        scores, expected = torch.stack(found.router_logits, dim=1)[:-1].sort(dim=-1, descending=True)
        clear = (scores.diff(dim=-1)[..., : trace.top_k] < -MARGIN).all(-1).numpy()
        assert np.array_equal(trace.experts[clear], expected[..., : trace.top_k].numpy()[clear])
        compared, routed = compared + clear.sum(), routed + clear.size
        top = sample.top_tokens
        assert top is not None
        assert np.isfinite(top.logprobs).all(axis=1).tolist() == mask[len(sample.prompt.token_ids) - 1 :].tolist()
    assert compared > 0.98 * routed > 1000
    write_groups(tmp_path / "groups.jsonl", groups, weight_version=0)
    for before, after in zip(samples(groups), samples(read_groups(tmp_path / "groups.jsonl")), strict=True):
        assert np.array_equal(before.loss_mask, after.loss_mask)
        assert before.trace is not None
        assert after.trace is not None
        assert after.trace.checksum == before.trace.checksum
        assert after.verdict == before.verdict


def test_the_environment_hears_what_was_sampled_and_its_answers_are_masked_out(
    routed_url: str, environments: Callable[[str], Environments]
) -> None:
    groups, (proxy,) = collect(routed_url, sampling(environments("Adding")))
    for sample in samples(groups):
        (one, said), (_, heard), (_, again), (_, heard_again), (last, end) = turns_of(sample)
        assert (one, last) == (True, True)
        assert heard == f"+1 {said[-4:]}"
        assert heard_again == f"+2 {again[-4:]}"
        assert sample.verdict == Verdict(float(len(said + again + end)), True)
        assert sample.prompt.token_ids == tuple(TOKENIZER.encode(sample.prompt.text))
    histories = [tuple(body["input_ids"]) for path, body in proxy.seen if path == "/generate"]
    for sample in samples(groups):  # what was sent is what was sampled, and nothing was written anew
        whole = tuple(sample.token_ids.tolist())
        assert sum(whole[: len(history)] == history for history in set(histories)) == 3
    seeds = {body["sampling_params"]["sampling_seed"] for path, body in proxy.seen if path == "/generate"}
    assert len(seeds) == len(histories) == 36


def test_a_conversation_is_cut_off_at_the_most_turns_and_is_then_wrong(
    routed_url: str, environments: Callable[[str], Environments]
) -> None:
    groups, _ = collect(routed_url, sampling(environments("Adding"), max_turns=2))
    for sample in samples(groups):
        assert (sample.turns, sample.finish_reason, sample.verdict) == (2, "length", Verdict(0.0, False))
        assert sample.loss_mask[-1]


def test_tokens_of_both_sides_stay_within_the_length_limit(
    routed_url: str, environments: Callable[[str], Environments]
) -> None:
    groups, _ = collect(routed_url, sampling(environments("Adding"), max_response_tokens=12))
    reasons = [sample.finish_reason for sample in samples(groups)]
    assert "length" in reasons
    for sample in samples(groups):
        assert len(sample.response_ids) <= 12
        assert sample.loss_mask[-1]
        if sample.finish_reason == "length":
            assert sample.verdict == Verdict(0.0, False)
    assert {sample.turns for sample in samples(groups)} > {1}


def test_turns_of_a_group_stay_on_one_server_and_go_on_elsewhere_if_it_fails(
    routed_url: str, routed_model_dir: Path, environments: Callable[[str], Environments]
) -> None:
    asked = sampling(environments("Adding"), routed_model_dir)
    _, proxies = collect(routed_url, asked, servers=3)
    assert [sum(path == "/generate" for path, _ in proxy.seen) for proxy in proxies] == [12, 12, 12]

    fails_in_later_turns = [Fault()] * 6 + [Fault(status=500)]
    groups, proxies = collect(routed_url, asked, *fails_in_later_turns, servers=2)
    whole = [tuple(sample.token_ids.tolist()) for sample in samples(groups)]
    sent = [[tuple(b["input_ids"]) for path, b in proxy.seen if path == "/generate"] for proxy in proxies]
    # A history that the failing server has sampled a part of goes on, as it was, at the other one.
    opened = set(sent[0][:6])
    moved = [history for history in sent[1] if any(history[: len(each)] == each != history for each in opened)]
    assert moved
    assert all(any(tokens[: len(history)] == history for tokens in whole) for history in moved)
    for sample in samples(groups):
        assert sample.turns == 3
        assert sample.trace is not None
        assert sample.trace.rows == len(sample.token_ids) - 1


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("raise", "RuntimeError: the tool is broken"),
        ("hang", r"took over 2 s \(reward.timeout\)"),
        ("crash", "its process ended"),
        ("exit", "SystemExit: 3"),
        ("nonsense", "step returned None as messages, expected a list"),
    ],
)
def test_a_step_that_fails_loses_its_sample_and_no_other(
    routed_url: str, environments: Callable[..., Environments], caplog: pytest.LogCaptureFixture, how: str, why: str
) -> None:
    proxy = FaultProxy(routed_url)
    asked = sampling(environments("Failing", timeout=2.0 if how == "hang" else 60.0))
    both = [(0, prompts("end")[0][1]), (1, prompts(how)[1][1])]
    good, bad = sampled_groups.collect([proxy], both, dataclasses.replace(asked, samples=2), 16)
    for sample in good.samples:
        assert (sample.turns, sample.finish_reason, sample.verdict) == (2, "stop", Verdict(1.0, True))
    for sample in bad.samples:
        assert sample.verdict is not None
        assert sample.verdict.lost
        assert sample.turns == 2
    assert len(caplog.records) == 2
    assert re.search(f"prompt 'p1' sample [01]: left out: {why}", caplog.text)


@pytest.mark.parametrize(
    ("name", "changes", "why"),
    [
        ("Closed", {}, "prompt 'p0': reset failed: FileNotFoundError: no such game"),
        ("Moody", {}, "prompt 'p.': reset returned other messages for another sample"),
        (
            "Adding",
            {"max_prompt_tokens": 3},
            "opening messages have 10 tokens, expected 1 to data.max_prompt_tokens = 3",
        ),
    ],
)
def test_a_conversation_that_cannot_be_opened_is_an_error(
    routed_url: str, environments: Callable[[str], Environments], name: str, changes: dict[str, int], why: str
) -> None:
    with pytest.raises(EnvError, match=why):
        collect(routed_url, sampling(environments(name), **changes))
