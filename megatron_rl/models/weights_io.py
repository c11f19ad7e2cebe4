"""Weights from and to a Hugging Face model directory, tensor by tensor.

Loading: each rank reads from the safetensors files only what it holds. Saving: one process writes a stream
of whole tensors, and never holds more than one file's worth.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rl.errors import FileInTheWayError
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.binding import ModelRanks, Slot, WeightNames, bind
from megatron_rl.models.fields import ModelError
from megatron_rl.models.quantisation import FIELD
from megatron_rl.models.registry import family_of, tensors_of, weights_of
from megatron_rl.models.shards import fill
from megatron_rl.models.tensor_files import INDEX, SINGLE, TensorFiles
from megatron_rl.models.weight import Source

MAX_SHARD_BYTES = 4 << 30
"""Largest file of weights that a run writes."""
HEAD = "lm_head.weight"
"""What files of every family call the output layer."""
# Besides weights, what a server or transformers needs to load the directory.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    # Of models that see images.
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype that engine.dtype names: fp32 or bf16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module], arch: Architecture, model_dir: Path, ranks: ModelRanks, names: WeightNames
) -> tuple[str, ...]:
    """Fills every parameter of this rank's stages (unwrapped GPTModels), once, in the parameter's own dtype.

    `names` are those of the stages' layers.

    Returns the names of tensors in the files that the model does not use, all of them known to be harmless.
    Raises ModelError naming parameter, tensor or file: for a missing, unknown or
    misshapen tensor, and for all that `bind` refuses.
    """
    files = TensorFiles(model_dir)
    slots = bind(chunks, arch, ranks, names)
    unused = check_names(files, arch)
    for slot in slots:
        shard = slot.of(slot.parameter.data)
        if slot.weight.optional and slot.weight.sources[0].name not in files.names:
            shard.zero_()
        else:
            fill(slot.weight, shard, files.read, *ranks.share(slot.weight))
    if HEAD in unused and not arch.value_head:
        _check_stray_head(files, slots, ranks)
    return unused


def check_names(files: TensorFiles, arch: Architecture) -> tuple[str, ...]:
    """Returns the names of harmless tensors in excess. Raises ModelError for a missing or unknown one.

    Looks at all tensors of the model, not only this rank's, so that every rank gives the same answer.
    """
    wanted = {name for parts in tensors_of(arch) for name in files.holders(parts)}
    optional = {source.name for weight in weights_of(arch) if weight.optional for source in weight.sources}
    if missing := sorted(wanted.difference(files.names, optional)):
        raise ModelError(f"{files.listing}: {_some(missing)} missing; config.json asks for it")
    excess = sorted(set(files.names) - wanted - files.scales())
    no_head = arch.tied_embeddings or arch.value_head
    harmless = [*family_of(arch).UNUSED, *([re.escape(HEAD)] if no_head else [])]
    predictors = range(arch.num_layers, arch.num_layers + arch.predictor_layers)
    harmless += [rf"model\.layers\.{number}\..*" for number in predictors]
    unknown = [name for name in excess if not any(re.fullmatch(pattern, name) for pattern in harmless)]
    if unknown:
        raise ModelError(
            f"{files.listing}: {_some(unknown)} has no place in the {arch.model_type} model of config.json; "
            "remove it from the files, or correct config.json"
        )
    return tuple(excess)


def _check_stray_head(files: TensorFiles, slots: Sequence[Slot], ranks: ModelRanks) -> None:
    """Some checkpoints with tied embeddings store the output layer all the same: it must be the embedding."""
    for slot in slots:
        if slot.weight.name == "embedding.word_embeddings.weight":
            (embedding,) = slot.weight.sources
            head = Source(HEAD, embedding.shape)
            for piece in slot.weight.cut(*ranks.share(slot.weight))[1]:
                stretch = (slot.weight.sharding.dim, piece.start, piece.length)
                if not torch.equal(files.read(head, *stretch), files.read(embedding, *stretch)):
                    raise ModelError(
                        f"{files.listing}: {HEAD} differs from {embedding.name}, "
                        "but config.json says tie_word_embeddings = true; set it to false"
                    )


def save_weights(
    tensors: Iterable[tuple[str, Tensor]],
    model_dir: Path,
    source_dir: Path,
    max_shard_bytes: int,
    dtype: torch.dtype | None,
    value_head: bool = False,
) -> None:
    """Writes a Hugging Face directory: `tensors` cast to `dtype`, the rest from source_dir; with `value_head` that of a
    model with one number per token. A `dtype` of None leaves each tensor's dtype, and config.json's, as they are.
    config.json loses its quantization_config, as no tensor is quantised. Tensors of source_dir that the model does not
    use, such as those of a vision tower, are copied.

    The directory appears whole or not at all. Raises FileInTheWayError when model_dir is there already and is not an
    empty directory, and ModelError when a tensor is not one of source_dir's config.json, comes twice, has another shape
    or never comes.
    """
    model_dir, source_dir = Path(model_dir), Path(source_dir)
    arch = read_architecture(source_dir, value_head)
    check_free(model_dir)
    partial = model_dir.with_name(f".{model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        _copy_companions(source_dir, partial, dtype, arch)
        written = itertools.chain(_cast(_checked(tensors, arch), arch, dtype), _unused(source_dir, arch))
        _write_shards(written, partial, max_shard_bytes)
        partial.rename(model_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(model_dir: Path) -> None:
    """Raises FileInTheWayError if there is something where a model is to be written, unless it is an empty
    directory."""
    is_empty = model_dir.is_dir() and not model_dir.is_symlink() and not any(model_dir.iterdir())
    if (model_dir.exists() or model_dir.is_symlink()) and not is_empty:
        raise FileInTheWayError(f"{model_dir} exists already; choose another directory, or remove it")


def _copy_companions(source_dir: Path, target: Path, dtype: torch.dtype | None, arch: Architecture) -> None:
    for file in sorted({f for pattern in COMPANIONS for f in source_dir.glob(pattern) if f.is_file()}):
        shutil.copyfile(file, target / file.name)
    found = json.loads((target / "config.json").read_text())
    config = {field: value for field, value in found.items() if field != FIELD}
    changed: dict[str, Any] = {}
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = name
        if "text_config" in config:  # whose dtype engines take for the language model's
            changed["text_config"] = {**config["text_config"], "dtype": name}
            changed["text_config"].pop("torch_dtype", None)
    if arch.value_head:
        labels = {"id2label": {"0": "value"}, "label2id": {"value": 0}}
        changed |= {"architectures": [family_of(arch).VALUE_MODEL], **labels}
    if (new := {**config, **changed}) != found:
        (target / "config.json").write_text(json.dumps(new, indent=2) + "\n")


def _checked(tensors: Iterable[tuple[str, Tensor]], arch: Architecture) -> Iterable[tuple[str, Tensor]]:
    weights = weights_of(arch)
    awaited = {source.name: source.whole.shape for weight in weights for source in weight.sources}
    for name, tensor in tensors:
        if name not in awaited:
            raise ModelError(
                f"{name} was to be saved, but is no tensor of this {arch.model_type} model, or came before"
            )
        if (shape := awaited.pop(name)) != tuple(tensor.shape):
            raise ModelError(f"{name} was to be saved with shape {tuple(tensor.shape)}; expected {shape}")
        yield name, tensor
    if awaited:
        raise ModelError(f"never given to be saved: {_some(sorted(awaited))}")


def _unused(source_dir: Path, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    files = TensorFiles(source_dir)
    for name in check_names(files, arch):
        if name != HEAD:  # of a critic, or what tied embeddings were before
            yield name, files.copy(name)


def _cast(
    tensors: Iterable[tuple[str, Tensor]], arch: Architecture, dtype: torch.dtype | None
) -> Iterable[tuple[str, Tensor]]:
    """Copies tensors to the CPU, cast to `dtype`. Weights that do not train keep theirs: rounded, a router's bias would
    choose other experts."""
    kept = {source.name for weight in weights_of(arch) if not weight.trained for source in weight.sources}
    for name, tensor in tensors:
        own = None if name in kept else dtype
        yield name, tensor.detach().to(device="cpu", dtype=own, copy=True).contiguous()


def _write_shards(tensors: Iterable[tuple[str, Tensor]], target: Path, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []  # names per file
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = 0

    def write() -> None:
        file = target / f"{len(shards)}.safetensors"
        try:
            save_file(held, file, metadata={"format": "pt"})
        except SafetensorError as error:  # which has the system's error only in its text
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error
        shutil.copymode(target / "config.json", file)  # safetensors makes it readable by its owner alone
        shards.append(list(held))
        held.clear()

    for name, stored in tensors:
        if held and held_bytes + stored.nbytes > max_shard_bytes:
            write()
            held_bytes = 0
        held[name] = stored
        held_bytes += stored.nbytes
        total_bytes += stored.nbytes
    write()

    if len(shards) == 1:
        (target / "0.safetensors").rename(target / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (target / f"{number}.safetensors").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
