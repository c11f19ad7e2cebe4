"""`megatron-rl parity`: compares the engine's log-probs and gradients with transformers and with a live server.

The calling process computes the reference once, in fp32, and writes it to a temporary directory. The engine runs on
ranks started for each world size, and rank 0 compares. The loss is the mean negative log-prob of all tokens except the
first of each sequence.

In fp32 the largest differences have bounds. In bf16 a router takes another expert wherever two are nearly even, so that
the largest differences of a right engine are as large as those of a wrong one: there the bounds are what transformers
itself loses in bf16, in the root mean square; and no single gradient may be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson

from megatron_rl.config.layout import Layout, check_layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.config.servers import url_problem
from megatron_rl.data.sample import Prompt, Sample
from megatron_rl.data.vocabulary import unknown_token
from megatron_rl.errors import UserError
from megatron_rl.garbage import collect_rarely
from megatron_rl.lab.differences import Bounds, Errors, GradientErrors, finite, largest_and_rms
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.quantisation import refuse_quantised
from megatron_rl.models.registry import tensors_of, weights_of


@dataclass(frozen=True)
class ParitySpec:
    """The task of the ranks, handed over as JSON."""

    model: str
    reference: str  # directory with logprobs.json and gradients.safetensors
    layouts: list[str]
    dtype: str
    recompute: str
    device: str
    max_tokens: int | None


@dataclass(frozen=True)
class ParityResult:
    """Errors of a layout, or of a live server by its URL, which has no gradients."""

    kind: Literal["layout", "server"]
    of: str
    tokens: int
    errors: Errors


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

    refuse_quantised(model, "which transformers computes with on some GPUs only")
    check_weights(model, values=True)

    with tempfile.TemporaryDirectory(prefix="megatron-rl-parity-") as scratch:
        logprobs, transformers = write_reference(model, sequences, Path(scratch), dtype)
        bounds = Bounds.of(transformers)
        # Ask the server before the ranks are started, so that a wrong URL is reported at once.
        served = [_compare_server(url, api_key, sequences, logprobs)] if url else []
        results: dict[str, ParityResult] = {}
        for world, same_world in sorted(by_world.items()):
            spec = ParitySpec(str(model), scratch, same_world, dtype, recompute, device, max_tokens)
            results |= {r.of: r for r in _run_ranks(spec, world, Path(scratch))}
    ordered = [*(results[text] for text in layouts), *served]
    _report(ordered, bounds, dtype, as_json)
    return 0 if all(bounds.allow(r.errors) for r in ordered) else 1


def write_reference(
    model: Path, sequences: Sequence[Sequence[int]], directory: Path, dtype: str
) -> tuple[list[list[float]], Errors | None]:
    """Writes fp32 log-probs and gradients of transformers; returns each sequence's log-probs of tokens 1 and later, and
    the errors of transformers in `dtype`, if that is another."""
    from safetensors.torch import save_file

    logprobs, gradients = _transformers(model, sequences, "fp32")
    save_file(gradients, directory / "gradients.safetensors")
    (directory / "logprobs.json").write_bytes(orjson.dumps(logprobs))
    (directory / "tokens.json").write_bytes(orjson.dumps(sequences))
    if dtype == "fp32":
        return logprobs, None
    lower, lower_gradients = _transformers(model, sequences, dtype)
    grads = GradientErrors()
    for name, gradient in lower_gradients.items():
        grads.add(name, gradient.float().numpy(), gradients[name].numpy())
    return logprobs, grads.errors(*largest_and_rms(np.concatenate(lower) - np.concatenate(logprobs)))


def _transformers(
    model: Path, sequences: Sequence[Sequence[int]], dtype: str
) -> tuple[list[list[float]], dict[str, Any]]:
    """Returns each sequence's log-probs, and the gradients by the weights' names in files."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from megatron_rl.models.weights_io import torch_dtype

    logging.disable_progress_bar()
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch_dtype(dtype), trust_remote_code=False)
    # transformers leaves out the gradient of the padding token's row, even where that token is read.
    reference.get_input_embeddings().padding_idx = None
    total = sum(len(ids) - 1 for ids in sequences)
    logprobs = []
    for ids in sequences:
        logits = reference(input_ids=torch.tensor([ids])).logits[0, :-1].float()
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
        (-chosen.sum() / total).backward()
        logprobs.append(chosen.tolist())
    return logprobs, file_gradients(reference, read_architecture(model))


def file_gradients(reference: Any, arch: Architecture) -> dict[str, Any]:
    """Gradients under the names that the model's weights have in files. Puts them in the weights' place."""
    import torch
    from safetensors.torch import load_file

    from megatron_rl.models.shards import join

    with torch.no_grad():
        for parameter in reference.parameters():
            grad = parameter.grad
            parameter.copy_(torch.zeros_like(parameter) if grad is None else grad)
    with tempfile.TemporaryDirectory() as scratch:
        reference.save_pretrained(scratch)
        found = {name: each for file in Path(scratch).glob("*.safetensors") for name, each in load_file(file).items()}
    for parts in tensors_of(arch):
        # transformers writes some tensors as it found them, and may have found the parts alone.
        alone = [part.alone for part in parts if part.alone in found]
        if alone:
            found[parts[0].name] = join(parts, [found.pop(name) for name in alone])
    return found


def _run_ranks(spec: ParitySpec, world: int, scratch: Path) -> list[ParityResult]:
    from megatron_rl.ranks.launch import ask_ranks

    answer = ask_ranks("megatron_rl.parity", asdict(spec), world, scratch)
    if answer is None:
        raise ParityError(f"the engine failed on {world} ranks for layouts {spec.layouts}; its output is above")
    return [ParityResult("layout", each["of"], each["tokens"], _read(each["errors"])) for each in answer]


def _read(errors: dict[str, Any]) -> Errors:
    """JSON has no infinity: it was written as null."""
    found: dict[str, Any] = {key: math.inf if value is None else value for key, value in errors.items()}
    return Errors(**found)


def _compare_server(
    url: str, api_key: str | None, sequences: Sequence[list[int]], logprobs: Sequence[list[float]]
) -> ParityResult:
    from megatron_rl.rollout.client import SGLangClient

    async def ask() -> list[list[float]]:
        async with SGLangClient(url, api_key=api_key) as client:
            return await asyncio.gather(*(client.score(ids) for ids in sequences))

    difference = np.concatenate(asyncio.run(ask())) - np.concatenate(logprobs)
    return ParityResult("server", url, len(difference), Errors(*largest_and_rms(difference)))


def _report(results: Sequence[ParityResult], bounds: Bounds, dtype: str, as_json: bool) -> None:
    if as_json:
        for r in results:
            measured = {r.kind: r.of, "tokens": r.tokens, **asdict(r.errors), "passed": bounds.allow(r.errors)}
            print(orjson.dumps({**measured, "bounds": asdict(bounds), "dtype": dtype}).decode())  # inf becomes null
        return
    from rich.console import Console
    from rich.table import Table

    title = f"parity with transformers in fp32 ({dtype}; bounds {bounds.logprob:.2g} and {bounds.grad:.2g})"
    what = ("max abs", "max rel") if bounds.of_largest else ("rms", "rms rel")
    table = Table(title=title)
    for column in ("layout", "tokens", f"log-prob, {what[0]}", f"gradient, {what[1]}", "worst gradient", "passed"):
        table.add_column(column, overflow="fold")
    for r in results:
        logprob, grad, worst = bounds.measured(r.errors)
        gradient = ("", "") if grad is None else (f"{grad:.2e}", worst)
        verdict = "yes" if bounds.allow(r.errors) else "NO"
        table.add_row(r.of, str(r.tokens), f"{logprob:.2e}", *gradient, verdict)
    Console().print(table)


# ---- on the ranks ----------------------------------------------------------------------------------------------


def worker(spec: ParitySpec, answer: Path) -> None:
    from megatron_rl.engine.device import use_device

    device = use_device(spec.device)
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
            stop_process_groups(leave_world=False)
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
    planned = step.micro_batches[place.dp]
    batches = pack_all(
        [[(samples[i], 0.0) for i in ids] for ids in planned], cp=layout.cp, tp=layout.tp, equal=layout.vpp > 1
    )
    policy = Policy(Path(spec.model), layout, place, engine, device, optim=None)

    differences = [np.zeros(0)]
    for ids, batch, (logprobs, _) in zip(planned, batches, policy.logprobs(batches) or [], strict=False):
        if not ids:
            continue
        differences.append(logprobs.cpu().numpy()[batch.loss_mask] - np.concatenate([wanted[i] for i in ids]))
    mine = np.concatenate(differences)
    largest = torch.tensor(largest_and_rms(mine)[0], dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=place.control)
    # Ranks with the same tokens all count them.
    squares = torch.tensor([np.square(mine).sum(), len(mine)], dtype=torch.float64)
    dist.all_reduce(squares, group=place.control)

    masks = [torch.as_tensor(b.loss_mask, device=device) for b in batches]
    policy.gradients(batches, lambda k, logprobs, _: sft_loss(logprobs, masks[k], step.denominators).loss)
    errors = GradientErrors()
    with safe_open(reference / "gradients.safetensors", "pt") as file:
        untrained = {s.name for weight in weights_of(policy.arch) if not weight.trained for s in weight.sources}
        missing = set(file.keys()) - untrained
        for bucket in policy.export(64 << 20, tensor_of=lambda p: p.main_grad):  # type: ignore[attr-defined]
            for tensor_name, gradient in bucket:
                missing.discard(tensor_name)
                errors.add(tensor_name, gradient.cpu().float().numpy(), file.get_tensor(tensor_name).numpy())
    if place.rank == 0 and missing:
        raise ParityError(f"layout {text}: no gradient was exported for {sorted(missing)[:5]}")
    rms = finite(float(squares[0] / squares[1]) ** 0.5)
    return ParityResult("layout", text, total - len(sequences), errors.errors(largest.item(), rms))


def _as_sample(index: int, ids: list[int]) -> Sample:
    prompt = Prompt(id=str(index), text="", token_ids=(ids[0],), answer="", verifier="")
    return Sample.start(prompt, 0).extend(ids[1:], [0.0] * (len(ids) - 1), weight_version=0)


if __name__ == "__main__":
    collect_rarely()
    worker(ParitySpec(**json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]))
