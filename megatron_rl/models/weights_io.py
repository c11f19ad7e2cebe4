"""Weights from and to a Hugging Face model directory, tensor by tensor.

Loading: each rank reads from the safetensors files only what it holds. Saving: one process writes a stream
of whole tensors, and never holds more than one file's worth.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_rl.errors import FileInTheWayError
from megatron_rl.models.architecture import Architecture, read_architecture
from megatron_rl.models.binding import ModelRanks, Slot, WeightNames, bind
from megatron_rl.models.fields import MissingModelError, ModelError, cut, read_json_object
from megatron_rl.models.fp8 import FP8, SCALE_DTYPES, decode, scale_name, touched
from megatron_rl.models.quantisation import FIELD, Fp8Blocks, read_quantisation
from megatron_rl.models.registry import family_of, weights_of
from megatron_rl.models.shards import fill
from megatron_rl.models.weight import Shape, Source

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,200}\.safetensors")
_DTYPES = ("F32", "F16", "BF16", FP8)
MAX_SHARD_BYTES = 4 << 30
"""Largest file of weights that a run writes."""
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
)


def torch_dtype(name: str) -> torch.dtype:
    """Returns the dtype that engine.dtype names: fp32 or bf16."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


class TensorFiles:
    """The safetensors files of a model directory; reads stretches of tensors without the whole.

    Raises MissingModelError when the directory has neither an index nor a single file, or a listed file is absent.
    Raises ModelError when it has both, as transformers would read one and SGLang the other, and for a damaged one.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = Path(model_dir)
        self._handles: dict[Path, Any] = {}
        index, single = self.model_dir / _INDEX, self.model_dir / _SINGLE
        if index.exists() and single.exists():
            raise ModelError(f"{self.model_dir} holds both {_INDEX} and {_SINGLE}; engines differ over it: remove one")
        if index.exists():
            self._files = {name: self.model_dir / file for name, file in _weight_map(index).items()}
            self.listing = index
        elif single.exists():
            self._files = dict.fromkeys(self._open(single).keys(), single)
            self.listing = single
        else:
            raise MissingModelError(f"{self.model_dir} holds neither {_INDEX} nor {_SINGLE}; expected one of them")

    @property
    def names(self) -> list[str]:
        return sorted(self._files)

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, ..."""
        return str(self._slice(name).get_dtype())

    def read(self, source: Source, dim: int, start: int, length: int) -> Tensor:
        """Reads positions [start, start + length) of a source along `dim`, in the file's dtype, on the CPU.

        A weight in fp8 becomes fp32: its values times the scales of their blocks. Raises ModelError for what `check`
        refuses, and for values or scales that are not finite.
        """
        self.check(source)
        if source.part is None:
            stretch = self._stretch(source.name, dim, start, length)
        else:
            stretch = self._slice(source.name)[source.part.stretch(dim, start, length)]
            stretch = stretch.t() if source.part.transposed else stretch
        if self.is_fp8(source.name):
            stretch = self._dequantised(source.name, stretch, dim, start)
        if stretch.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(stretch)).tolist())):
            raise ModelError(
                f"{self._files[source.name]}: {source.name} holds NaN or infinity; nothing can be trained from it: "
                "copy the file again, or take an earlier checkpoint"
            )
        return stretch

    def whole(self, source: Source) -> Tensor:
        """Reads a tensor as a copy in bf16 stores it: in the file's dtype, or in bf16 if that is fp8."""
        tensor = self.read(source, 0, 0, source.shape[0])
        return tensor.bfloat16() if self.is_fp8(source.name) else tensor

    def is_fp8(self, name: str) -> bool:
        return self.dtype(name) == FP8

    def scales(self) -> set[str]:
        """Returns the names of the tensors that hold scales of weights in fp8."""
        return {scale_name(name) for name in self._files if scale_name(name) in self._files and self.is_fp8(name)}

    def check(self, source: Source) -> None:
        """Raises ModelError when the source's tensor is missing, or has another shape, or no dtype that is read.

        If it is in fp8, its scales are checked too.
        """
        name = source.name
        if (found := self.shape(name)) != (shape := source.whole.shape):
            raise ModelError(f"{self._files[name]}: {name} has shape {found}; config.json asks for {shape}")
        if (dtype := self.dtype(name)) not in _DTYPES:
            raise ModelError(f"{self._files[name]}: {name} has dtype {dtype}; expected one of {', '.join(_DTYPES)}")
        if dtype == FP8:
            self._check_fp8(name)

    def check_listing(self) -> None:
        """Raises ModelError unless every file is whole and holds the tensors that the index puts there, no others."""
        held: dict[str, Path] = {}
        for file in sorted(set(self._files.values())):
            for name in list(self._open(file).keys()):
                if self._files.get(name) != file:
                    where = f"in {self._files[name].name}" if name in self._files else "nowhere"
                    raise ModelError(f"{file}: tensor {name} is in it; {self.listing.name} puts it {where}")
                held[name] = file
        for name in self._files.keys() - held.keys():
            self._slice(name)  # raises: it is missing

    @functools.cached_property
    def _blocks(self) -> Fp8Blocks | None:
        return read_quantisation(self.model_dir)

    def _check_fp8(self, name: str) -> None:
        file, scale, shape = self._files[name], scale_name(name), self.shape(name)
        if self._blocks is None:
            raise ModelError(
                f"{file}: {name} has dtype {FP8}, but config.json has no {FIELD}; "
                "take config.json and weights from one source"
            )
        if len(shape) != 2:
            raise ModelError(f"{file}: {name} has dtype {FP8} and shape {shape}; only matrices have scales per block")
        if scale not in self._files:
            raise ModelError(f"{self.listing}: tensor {scale} is missing; {name} is in fp8, and those are its scales")
        if (found := self.shape(scale)) != (expected := self._blocks.count(shape)):
            raise ModelError(f"{self._files[scale]}: {scale} has shape {found}; {name} has {expected} blocks")
        if (dtype := self.dtype(scale)) not in SCALE_DTYPES:
            raise ModelError(
                f"{self._files[scale]}: {scale} has dtype {dtype}; expected one of {', '.join(SCALE_DTYPES)}"
            )

    def _stretch(self, name: str, dim: int, start: int, length: int) -> Tensor:
        stretch: Tensor = self._slice(name)[(slice(None),) * dim + (slice(start, start + length),)]
        return stretch

    def _dequantised(self, name: str, stretch: Tensor, dim: int, start: int) -> Tensor:
        assert self._blocks is not None  # _check_fp8 has seen it
        scale = scale_name(name)
        scales = self._stretch(scale, dim, *touched(self._blocks.size[dim], start, stretch.shape[dim]))
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise ModelError(f"{self._files[scale]}: {scale} holds a scale that is not a finite number above 0")
        return decode(stretch, scales, self._blocks, dim, start)

    def _open(self, file: Path) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise MissingModelError(f"{self.listing} lists {file.name}, which does not exist") from None
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{file} is not a whole safetensors file: {cut(str(error))}") from None
        return self._handles[file]

    def _slice(self, name: str) -> Any:
        if name not in self._files:
            raise ModelError(f"{self.listing}: tensor {name} is missing; config.json asks for it")
        try:
            return self._open(self._files[name]).get_slice(name)
        except SafetensorError:
            raise ModelError(
                f"{self._files[name]}: tensor {name} is missing; {self.listing.name} puts it there"
            ) from None


def _weight_map(index: Path) -> dict[str, str]:
    """File names by tensor: of files beside the index, and nowhere else."""
    content = read_json_object(index).get("weight_map")
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{index} is not an index: expected an object weight_map, of file names by tensor")
    for name, file in content.items():
        if not isinstance(file, str) or not _FILE_NAME.fullmatch(file):
            raise ModelError(
                f"{index}: weight_map puts {name[:100]} in {str(file)[:100]!r}; expected the name of a .safetensors "
                "file in the same directory"
            )
    return content


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
    if "lm_head.weight" in unused and not arch.value_head:
        _check_stray_head(files, slots, ranks)
    return unused


def check_names(files: TensorFiles, arch: Architecture) -> tuple[str, ...]:
    """All tensors of the model, not only this rank's, so that every rank gives the same answer."""
    weights = weights_of(arch)
    wanted = {source.name for weight in weights for source in weight.sources}
    needed = {source.name for weight in weights if not weight.optional for source in weight.sources}
    if missing := sorted(needed.difference(files.names)):
        raise ModelError(f"{files.listing}: {_some(missing)} missing; config.json asks for it")
    excess = sorted(set(files.names) - wanted - files.scales())
    no_head = arch.tied_embeddings or arch.value_head
    harmless = [*family_of(arch).UNUSED, *([r"lm_head\.weight"] if no_head else [])]
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
            head = Source("lm_head.weight", embedding.shape)
            for piece in slot.weight.cut(*ranks.share(slot.weight))[1]:
                stretch = (slot.weight.sharding.dim, piece.start, piece.length)
                if not torch.equal(files.read(head, *stretch), files.read(embedding, *stretch)):
                    raise ModelError(
                        f"{files.listing}: lm_head.weight differs from {embedding.name}, "
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
    config.json loses its quantization_config, as no tensor is quantised.

    The directory appears whole or not at all. Raises FileInTheWayError when model_dir is there already, and
    ModelError when a tensor is not one of source_dir's config.json, comes twice, has another shape or never
    comes.
    """
    model_dir, source_dir = Path(model_dir), Path(source_dir)
    arch = read_architecture(source_dir, value_head)
    if model_dir.exists() or model_dir.is_symlink():
        raise FileInTheWayError(f"{model_dir} exists already; choose another directory, or remove it")
    partial = model_dir.with_name(f".{model_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        _copy_companions(source_dir, partial, dtype, arch)
        _write_shards(_cast(_checked(tensors, arch), arch, dtype), partial, max_shard_bytes)
        partial.rename(model_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_companions(source_dir: Path, target: Path, dtype: torch.dtype | None, arch: Architecture) -> None:
    for file in sorted({f for pattern in COMPANIONS for f in source_dir.glob(pattern) if f.is_file()}):
        shutil.copyfile(file, target / file.name)
    found = json.loads((target / "config.json").read_text())
    config = {field: value for field, value in found.items() if field != FIELD}
    changed: dict[str, Any] = {}
    if dtype is not None:
        changed["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
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
        (target / "0.safetensors").rename(target / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (target / f"{number}.safetensors").rename(target / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _some(names: Sequence[str]) -> str:
    """The first few of many names."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
