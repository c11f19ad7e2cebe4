"""`megatron-rl parity`: compares the engine's log-probs and gradients with transformers and with a live server.

The calling process computes the reference once, in fp32, and writes it to a temporary directory. The engine runs on
ranks started for each world size, and rank 0 compares. The loss is the mean negative log-prob of all tokens except the
first of each sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatron_rl.config.layout import Layout, check_layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.config.servers import url_problem
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.errors import UserError
from megatron_rl.garbage import collect_rarely
from megatron_rl.models.architecture import read_architecture

BOUNDS = {"fp32": (2e-5, 1e-4), "bf16": (0.1, 0.2)}
"""Largest |log-prob difference| and largest relative gradient difference that pass, by dtype."""


@dataclass(frozen=True)
class ParitySpec:
    """The task of the ranks, handed over as JSON."""

    model: str
    reference: str  # directory with logprobs.npy and gradients.safetensors
    layouts: list[str]
    dtype: str
    recompute: str
    device: str
    max_tokens: int | None


@dataclass(frozen=True)
class ParityResult:
    layout: str
    tokens: int
    logprob_max_abs_diff: float
    grad_max_rel_diff: float
    worst_gradient: str
    passed: bool


@dataclass(frozen=True)
class ServerResult:
    """Comparison of a live server's log-probs. A server has no gradients."""

    server: str
    tokens: int
    logprob_max_abs_diff: float
    passed: bool


class ParityError(UserError):
    """The tokens or the layout cannot be compared."""


def read_tokens(path: Path, vocab_size: int) -> list[list[int]]:
    """Reads one JSON list of at least two token ids from each line. Raises ParityError, which names the line."""
    sequences = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            ids = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            raise ParityError(f"{path}:{number}: not JSON ({error}); expected one list of token ids") from None
        if not isinstance(ids, list) or len(ids) < 2 or not all(type(i) is int for i in ids):
            raise ParityError(f"{path}:{number}: expected a list of at least two token ids")
        unknown = unknown_token(ids, vocab_size)
        if unknown:
            raise ParityError(f"{path}:{number}: {unknown}")
        sequences.append(ids)
    if not sequences:
        raise ParityError(f"{path}: no sequences; expected one list of token ids a line")
    return sequences


def run(
    model: Path,
    tokens: Path,
    layouts: list[str],
    dtype: str = "fp32",
    recompute: str = "none",
    device: str = "auto",
    url: str | None = None,
    as_json: bool = False,
    max_tokens: int | None = None,
    api_key: str | None = None,
) -> int:
    """Prints one result per layout and one for the server at `url`; returns 0 if all pass, else 1.

    Raises ParityError for unusable input, and RolloutError if the server's answer is unusable.
    """
    if url is not None and (problem := url_problem(url)):
        raise ParityError(f"--url: found {url!r}, expected {problem}")
    arch = read_architecture(model)
    sequences = read_tokens(tokens, arch.vocab_size)
    engine = EngineConfig(dtype=dtype, recompute=recompute, device=device)  # type: ignore[arg-type]
    by_world: dict[int, list[str]] = {}
    for text in layouts:
        layout = Layout.resolve(*parse_layout(text))
        problems = check_layout(layout, arch, engine)
        if problems:
            raise ParityError(f"--layout {text}: " + "; ".join(problems))
        by_world.setdefault(layout.world_size, []).append(text)
    from megatron_rl.models.check import check_weights

    check_weights(model, values=True)

    with tempfile.TemporaryDirectory(prefix="megatron-rl-parity-") as scratch:
        logprobs = write_reference(model, sequences, Path(scratch))
        # Ask the server before the ranks are started, so that a wrong URL is reported at once.
        served = _compare_server(url, api_key, sequences, logprobs, dtype) if url else None
        results: dict[str, ParityResult] = {}
        for world, same_world in sorted(by_world.items()):
            spec = ParitySpec(str(model), scratch, same_world, dtype, recompute, device, max_tokens)
            results |= {r.layout: r for r in _run_ranks(spec, world, Path(scratch))}
    ordered = [results[text] for text in layouts]
    _report(ordered, served, dtype, as_json)
    return 0 if all(r.passed for r in ordered) and (served is None or served.passed) else 1


def write_reference(model: Path, sequences: Sequence[Sequence[int]], directory: Path) -> list[list[float]]:
    """Writes fp32 log-probs and gradients of transformers; returns each sequence's log-probs of tokens 1 and later."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # transformers leaves out the gradient of the padding token's row, even where that token is read.
    reference.get_input_embeddings().padding_idx = None
    total = sum(len(ids) - 1 for ids in sequences)
    logprobs = []
    for ids in sequences:
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        (-chosen.sum() / total).backward()
        logprobs.append(chosen.tolist())
    gradients = dict(_file_tensors(reference))
    save_file(gradients, directory / "gradients.safetensors")
    (directory / "logprobs.json").write_bytes(orjson.dumps(logprobs))
    (directory / "tokens.json").write_bytes(orjson.dumps(sequences))
    return logprobs


def _file_tensors(reference: object) -> Iterator[tuple[str, object]]:
    """Gradients under the names that save_pretrained gives the weights in files."""
    import torch
    from safetensors.torch import load_file

    with torch.no_grad():
        for parameter in reference.parameters():  # type: ignore[attr-defined]
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    with tempfile.TemporaryDirectory() as scratch:
        reference.save_pretrained(scratch)  # type: ignore[attr-defined]
        for file in sorted(Path(scratch).glob("*.safetensors")):
            yield from load_file(file).items()


def _run_ranks(spec: ParitySpec, world: int, scratch: Path) -> list[ParityResult]:
    from megatron_rl.ranks.launch import ask_ranks

    answer = ask_ranks("megatron_rl.parity", asdict(spec), world, scratch)
    if answer is None:
        raise ParityError(f"the engine failed on {world} ranks for layouts {spec.layouts}; its output is above")
    return [ParityResult(**result) for result in answer]


def _compare_server(
    url: str, api_key: str | None, sequences: Sequence[list[int]], logprobs: Sequence[list[float]], dtype: str
) -> ServerResult:
    from megatron_rl.rollout.client import SGLangClient

    async def ask() -> list[list[float]]:
        async with SGLangClient(url, api_key=api_key) as client:
            return await asyncio.gather(*(client.score(ids) for ids in sequences))

    served, expected = np.concatenate(asyncio.run(ask())), np.concatenate(logprobs)
    difference = float(np.abs(served - expected).max())
    return ServerResult(url, len(expected), difference, difference <= BOUNDS[dtype][0])


def _report(results: Sequence[ParityResult], served: ServerResult | None, dtype: str, as_json: bool) -> None:
    logprob_bound, grad_bound = BOUNDS[dtype]
    if as_json:
        for r in results:
            bounds = {"logprob_bound": logprob_bound, "grad_bound": grad_bound}
            print(json.dumps({**asdict(r), **bounds, "dtype": dtype}))
        if served is not None:
            print(json.dumps({**asdict(served), "logprob_bound": logprob_bound, "dtype": dtype}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"parity with transformers ({dtype}; bounds {logprob_bound:g} and {grad_bound:g})")
    for column in ("layout", "tokens", "log-prob, max abs", "gradient, max rel", "worst gradient", "passed"):
        table.add_column(column, overflow="fold")
    for r in results:
        gradient = (f"{r.grad_max_rel_diff:.2e}", r.worst_gradient)
        table.add_row(r.layout, str(r.tokens), f"{r.logprob_max_abs_diff:.2e}", *gradient, _verdict(r.passed))
    if served is not None:
        difference = f"{served.logprob_max_abs_diff:.2e}"
        table.add_row(served.server, str(served.tokens), difference, "", "", _verdict(served.passed))
    Console().print(table)


def _verdict(passed: bool) -> str:
    return "yes" if passed else "NO"


# ---- on the ranks ----------------------------------------------------------------------------------------------


def worker(spec: ParitySpec, answer: Path) -> None:
    from megatron_rl.engine.device import use_device

    device = use_device(spec.device)
    from megatron.core import parallel_state

    from megatron_rl.ranks.heartbeat import Heartbeat
    from megatron_rl.ranks.place import start_process_groups, stop_process_groups

    engine = EngineConfig(dtype=spec.dtype, recompute=spec.recompute, device=spec.device)  # type: ignore[arg-type]
    results: list[ParityResult] = []
    with contextlib.ExitStack() as stack:
        for text in spec.layouts:
            layout = Layout.resolve(*parse_layout(text))
            place = start_process_groups(layout, device, seed=0)
            if not results:
                stack.enter_context(Heartbeat(place.control, engine.heartbeat))
            results.append(_compare(spec, text, layout, place, engine, device))
            parallel_state.destroy_model_parallel()
        if place.rank == 0:
            answer.write_bytes(orjson.dumps([asdict(r) for r in results]))
    stop_process_groups()


def _compare(spec: ParitySpec, text: str, layout: Layout, place, engine: EngineConfig, device) -> ParityResult:  # type: ignore[no-untyped-def]
    import torch
    import torch.distributed as dist
    from safetensors import safe_open

    from megatron_rl.data.packing import pack_all
    from megatron_rl.data.schedule import SampleSize, plan
    from megatron_rl.engine.policy import Policy
    from megatron_rl.objectives.policy_loss import sft_loss

    reference = Path(spec.reference)
    sequences = orjson.loads((reference / "tokens.json").read_bytes())
    wanted = orjson.loads((reference / "logprobs.json").read_bytes())
    samples = [_as_sample(index, ids) for index, ids in enumerate(sequences)]
    sizes = [SampleSize(i, i, len(s.token_ids), s.response_tokens) for i, s in enumerate(samples)]
    longest, total = max(s.tokens for s in sizes), sum(s.tokens for s in sizes)
    step = plan(
        sizes,
        mini_batches=1,
        dp=layout.dp,
        # Several micro-batches, so that the pipeline schedule is really run.
        max_tokens=spec.max_tokens or max(longest, total // (2 * layout.pp * layout.dp)),
        micro_batch_multiple=layout.micro_batch_multiple,
        align=layout.sequence_multiple,
    ).steps[0]
    mine = step.micro_batches[place.dp]
    batches = pack_all(
        [[(samples[i], 0.0) for i in ids] for ids in mine], cp=layout.cp, tp=layout.tp, equal=layout.vpp > 1
    )
    policy = Policy(Path(spec.model), layout, place, engine, device, optim=None)

    worst = 0.0
    for ids, batch, (logprobs, _) in zip(mine, batches, policy.logprobs(batches) or [], strict=False):
        if not ids:
            continue
        expected = np.concatenate([wanted[i] for i in ids])
        worst = max(worst, float(np.abs(logprobs.cpu().numpy()[batch.loss_mask] - expected).max()))
    difference = torch.tensor(worst)
    dist.all_reduce(difference, op=dist.ReduceOp.MAX, group=place.control)

    masks = [torch.as_tensor(b.loss_mask, device=device) for b in batches]
    policy.gradients(batches, lambda k, logprobs, _: sft_loss(logprobs, masks[k], step.denominators).loss)
    relative, name = 0.0, ""
    with safe_open(reference / "gradients.safetensors", "pt") as file:
        missing = set(file.keys())
        for bucket in policy.export(64 << 20, tensor_of=lambda p: p.main_grad):  # type: ignore[attr-defined]
            for tensor_name, gradient in bucket:
                missing.discard(tensor_name)
                error = _relative(gradient.cpu().float().numpy(), file.get_tensor(tensor_name).numpy())
                if error >= relative:
                    relative, name = error, tensor_name
    if place.rank == 0 and missing:
        raise ParityError(f"layout {text}: no gradient was exported for {sorted(missing)[:5]}")
    bounds = BOUNDS[spec.dtype]
    passed = difference.item() <= bounds[0] and relative <= bounds[1]
    return ParityResult(text, total - len(sequences), difference.item(), relative, name, passed)


def _as_sample(index: int, ids: list[int]) -> Sample:
    prompt = Prompt(id=str(index), text="", token_ids=(ids[0],), answer="", verifier="")
    return Sample.start(prompt, 0).extend(ids[1:], [0.0] * (len(ids) - 1), weight_version=0)


def _relative(found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Largest difference divided by the largest expected value; the difference itself if zeros are expected."""
    scale = float(np.abs(expected).max())
    return float(np.abs(found - expected).max()) / (scale or 1.0)


if __name__ == "__main__":
    collect_rarely()
    worker(ParitySpec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
