"""`megatron-rl certify`: proves, on the real model and in each layout, that routers replay exactly their own rows.

Layouts run on ranks started for each world size. router_watch.py proves the replay. spoil.py shows that the proof can
fail: each of its negative cases spoils the replay in one way and must be caught.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import orjson

from megatron_rl.certify.result import CertificateResult, CertificateSpec
from megatron_rl.config.layout import Layout, check_layout, parse_layout
from megatron_rl.config.schema import EngineConfig
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.random_model import make_random_model
from megatron_rl.models.registry import tensors_of

GRID = ("tp=1", "tp=2", "pp=2", "pp=2,vpp=2", "cp=2", "ep=2", "dp=2", "tp=2,ep=2,etp=2", "cp=2,ep=2", "tp=2,pp=2,ep=2")
RECOMPUTE = ("none", "full", "full:2", "moe", "core_attn,layernorm")
VOCABULARY = 512
"""Size of the vocabulary: every token of the certified batch has its own id."""


class CertifyError(UserError):
    """The model or the layout cannot be certified."""


def run(
    model: Path | None,
    layouts: Sequence[str],
    recompute: Sequence[str] = RECOMPUTE,
    dtype: str = "fp32",
    device: str = "auto",
    as_json: bool = False,
) -> int:
    """Prints one result per layout and recomputation; returns 0 if all pass, else 1. Raises CertifyError."""
    with tempfile.TemporaryDirectory(prefix="megatron-rl-certify-") as scratch:
        if model is None:
            model = Path(scratch) / "model"
            make_random_model(model, VOCABULARY)
        elif _read(model).vocab_size < VOCABULARY:
            model = _with_vocabulary(model, Path(scratch) / "model")
        engines = [EngineConfig(dtype=dtype, device=device, recompute=each) for each in recompute]  # type: ignore[arg-type]
        by_world = _by_world(model, layouts, engines)
        results: dict[tuple[str, str], CertificateResult] = {}
        for world, same_world in sorted(by_world.items()):
            spec = CertificateSpec(str(model), same_world, list(recompute), dtype, device)
            results |= {(r.layout, r.recompute): r for r in _run_ranks(spec, world, Path(scratch))}
    ordered = [results[layout, kind] for layout in layouts for kind in recompute]
    _report(ordered, as_json)
    return 0 if all(r.passed for r in ordered) else 1


def _read(model: Path) -> Architecture:
    """Reads the model's architecture. Raises ModelError if the ranks could not load the directory."""
    from megatron_rl.models.check import check_weights

    check_weights(model, values=True)
    return read_architecture(model)


def _by_world(model: Path, layouts: Sequence[str], engines: Sequence[EngineConfig]) -> dict[int, list[str]]:
    arch = read_architecture(model)
    if not arch.num_experts:
        raise CertifyError(f"--model {model}: no layer has experts; there is nothing to certify")
    by_world: dict[int, list[str]] = {}
    for text in layouts:
        layout = Layout.resolve(*parse_layout(text))
        problems = dict.fromkeys(problem for engine in engines for problem in check_layout(layout, arch, engine))
        if problems:
            raise CertifyError(f"--layout {text}: " + "; ".join(problems))
        by_world.setdefault(layout.world_size, []).append(text)
    return by_world


def _with_vocabulary(model: Path, directory: Path) -> Path:
    """Writes a copy of the model with random embeddings of VOCABULARY tokens; all other weights are unchanged."""
    import torch
    from safetensors.torch import load_file, save_file

    from megatron_rl.models.weights_io import HEAD

    config = orjson.loads((model / "config.json").read_bytes())
    tensors = {name: tensor for file in sorted(model.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    names = {parts[0].name for parts, kind in tensors_of(read_architecture(model)).items() if kind == "embedding"}
    for name in names | {HEAD}:  # which some files have beside tied embeddings
        if name in tensors:
            old = tensors[name]
            generator = torch.Generator().manual_seed(0)
            wide = torch.randn(VOCABULARY, old.shape[1], generator=generator) * old.float().std()
            tensors[name] = wide.to(old.dtype)
    config.get("text_config", config)["vocab_size"] = VOCABULARY  # beside a vision tower
    directory.mkdir()
    (directory / "config.json").write_bytes(orjson.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _run_ranks(spec: CertificateSpec, world: int, scratch: Path) -> list[CertificateResult]:
    from megatron_rl.ranks.launch import ask_ranks

    answer = ask_ranks("megatron_rl.certify.ranks", asdict(spec), world, scratch)
    if answer is None:
        raise CertifyError(f"the engine failed on {world} ranks for layouts {spec.layouts}; its output is above")
    return [CertificateResult(**result) for result in answer]


def _report(results: Sequence[CertificateResult], as_json: bool) -> None:
    if as_json:
        for r in results:
            print(json.dumps({**asdict(r), "passed": r.passed}))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="each router used exactly its own rows")
    for column in ("layout", "recompute", "rows replayed", "routed live", "again in backward", "caught", "passed"):
        table.add_column(column, no_wrap=column == "layout")
    for r in results:
        caught = f"{sum(r.caught.values())} of {len(r.caught)}"
        rows = (str(r.replayed_rows), str(r.live_rows), str(r.recomputed_rows))
        table.add_row(r.layout, r.recompute, *rows, caught, "yes" if r.passed else "NO")
    console = Console()
    console.print(table)
    for r in results:
        missed = [f"not caught: {name}" for name, caught in r.caught.items() if not caught]
        for problem in (*r.problems, *missed):
            console.print(f"{r.layout}, recompute {r.recompute}: {problem}")
