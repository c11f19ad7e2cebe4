"""The safetensors files of a model directory: stretches of tensors, as the values that they stand for if quantised."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rl.models import mxfp4
from megatron_rl.models.fields import MissingModelError, ModelError, cut, read_json_object
from megatron_rl.models.fp8 import FP8, SCALE_DTYPES, decode, scale_name, touched
from megatron_rl.models.quantisation import FIELD, Fp8Blocks, Mxfp4, read_quantisation
from megatron_rl.models.shards import join
from megatron_rl.models.weight import Shape, Source

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_FILE_NAME = re.compile(r"[^/\\\0\ud800-\udfff]{1,200}\.safetensors")
_DTYPES = ("F32", "F16", "BF16", FP8)


class TensorFiles:
    """The safetensors files of a model directory; reads stretches of tensors without the whole.

    Raises MissingModelError when the directory has neither an index nor a single file, or a listed file is absent.
    Raises ModelError when it has both, as transformers would read one and SGLang the other, and for a damaged one.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = Path(model_dir)
        self._handles: dict[Path, Any] = {}
        index, single = self.model_dir / INDEX, self.model_dir / SINGLE
        if index.exists() and single.exists():
            raise ModelError(f"{self.model_dir} holds both {INDEX} and {SINGLE}; engines differ over it: remove one")
        if index.exists():
            self._files = {name: self.model_dir / file for name, file in _weight_map(index).items()}
            self.listing = index
        elif single.exists():
            self._files = dict.fromkeys(self._open(single).keys(), single)
            self.listing = single
        else:
            raise MissingModelError(f"{self.model_dir} holds neither {INDEX} nor {SINGLE}; expected one of them")

    @property
    def names(self) -> list[str]:
        """Names of all tensors. A weight in mxfp4 has its own name, and not its blocks'."""
        weights = {mxfp4.blocks_name(name): name for name in self._in_blocks()}
        return sorted(weights.get(name, name) for name in self._files)

    def _in_blocks(self) -> set[str]:
        return {name for name in (file.removesuffix("_blocks") for file in self._files) if self._is_mxfp4(name)}

    def shape(self, name: str) -> Shape:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors names it: F32, BF16, ..."""
        return str(self._slice(name).get_dtype())

    def read(self, source: Source, dim: int, start: int, length: int) -> Tensor:
        """Reads positions [start, start + length) of a source along `dim`, in the file's dtype, on the CPU.

        A weight in fp8 or mxfp4 becomes fp32: its values times the scales of their blocks. Raises ModelError for what
        `check` refuses, and for values or scales that are not finite.
        """
        self.check(source)
        source = self.stored(source)
        if self._is_mxfp4(source.name):
            stretch = self._read_mxfp4(source, dim, start, length)
        elif self.dtype(source.name) == FP8:
            self._check_scales(source)
            stretch = self._read_fp8(source, dim, start, length)
        else:
            stretch = self._slice(source.name)[source.stretch(dim, start, length)]
            if source.part is not None and source.part.transposed:
                stretch = stretch.t()
        if stretch.numel() and not all(map(math.isfinite, torch.stack(torch.aminmax(stretch)).tolist())):
            raise ModelError(
                f"{self._file(source.name)}: {source.name} holds NaN or infinity; nothing can be trained from it: "
                "copy the file again, or take an earlier checkpoint"
            )
        return stretch

    def stored(self, source: Source) -> Source:
        """Returns the source as these files hold it: as part of a larger tensor, or alone."""
        return Source(source.alone, source.shape) if source.alone in self._files else source

    def holders(self, parts: Sequence[Source]) -> list[str]:
        """Returns the names of the tensors that these files hold the parts of a tensor in, or should hold."""
        alone = [part.alone for part in parts if part.alone is not None]
        return alone if any(name in self._files for name in alone) else [parts[0].name]

    def whole(self, parts: Sequence[Source]) -> Tensor:
        """Reads a tensor as a copy in bf16 stores it: in the file's dtype, or in bf16 if it is quantised. `parts` are
        all sources of it."""
        source = parts[0].whole
        if self.stored(parts[0]).name != source.name:
            tensor = join(parts, [self.read(part, 0, 0, part.shape[0]) for part in parts])
        elif self._is_mxfp4(source.name):
            return torch.cat([self.read(source, 0, expert, 1).bfloat16() for expert in range(source.shape[0])])
        else:
            tensor = self.read(source, 0, 0, source.shape[0])
        return tensor.bfloat16() if any(map(self.is_quantised, parts)) else tensor

    def check_copy(self, name: str) -> None:
        """Raises ModelError for a tensor that the model does not use and `copy` cannot read."""
        if self._is_mxfp4(name):
            raise ModelError(
                f"{self._file(name)}: {mxfp4.blocks_name(name)} is in mxfp4, and no weight of the model: it could not "
                "be copied into exports; remove it from the files"
            )
        if self.dtype(name) == FP8:
            self._check_fp8(name)

    def copy(self, name: str) -> Tensor:
        """Reads a tensor that the model does not use, whatever it holds: as it is, or in bf16 if it is in fp8."""
        if self.dtype(name) != FP8:
            tensor: Tensor = self._open(self._files[name]).get_tensor(name)
            return tensor
        source = Source(name, self.shape(name))
        return self._read_fp8(source, 0, 0, source.shape[0]).bfloat16()

    def is_quantised(self, source: Source) -> bool:
        """Whether the weight is stored in fp8 or mxfp4."""
        name = self.stored(source).name
        return self._is_mxfp4(name) or self.dtype(name) == FP8

    def _is_mxfp4(self, name: str) -> bool:
        return name not in self._files and mxfp4.blocks_name(name) in self._files

    def scales(self) -> set[str]:
        """Returns the names of the tensors that hold scales of weights in fp8 or mxfp4."""
        of_fp8 = {
            scale_name(name) for name in self._files if scale_name(name) in self._files and self.dtype(name) == FP8
        }
        return of_fp8 | {mxfp4.scales_name(name) for name in self.names if self._is_mxfp4(name)}

    def check(self, source: Source) -> None:
        """Raises ModelError when the source's tensor is missing, or has another shape, or no dtype that is read.

        If it is in fp8 or mxfp4, its scales are checked too.
        """
        source = self.stored(source)
        name = source.name
        if self._is_mxfp4(name):
            self._check_mxfp4(source.whole)
            return
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
    def _quantisation(self) -> Fp8Blocks | Mxfp4 | None:
        return read_quantisation(self.model_dir)

    @property
    def _blocks(self) -> Fp8Blocks | None:
        return self._quantisation if isinstance(self._quantisation, Fp8Blocks) else None

    def _check_mxfp4(self, source: Source) -> None:
        blocks, scales = mxfp4.blocks_name(source.name), mxfp4.scales_name(source.name)
        if not isinstance(self._quantisation, Mxfp4):
            raise ModelError(
                f"{self._files[blocks]}: {blocks} is in it, but config.json has no {FIELD} of mxfp4; "
                "take config.json and weights from one source"
            )
        count, inputs, outputs = source.shape if len(source.shape) == 3 else (0, 0, 0)
        expected = (count, outputs, inputs // mxfp4.BLOCK, mxfp4.BLOCK // 2)
        if inputs % mxfp4.BLOCK or self.shape(blocks) != expected:
            raise ModelError(
                f"{self._files[blocks]}: {blocks} has shape {self.shape(blocks)}; config.json asks for a weight "
                f"{source.shape}, in blocks of {mxfp4.BLOCK} inputs"
            )
        if (found := self.shape(scales)) != expected[:-1]:
            raise ModelError(f"{self._files[scales]}: {scales} has shape {found}; expected {expected[:-1]}")
        for name in (blocks, scales):
            if (dtype := self.dtype(name)) != mxfp4.BYTES:
                raise ModelError(f"{self._files[name]}: {name} has dtype {dtype}; expected {mxfp4.BYTES}")

    def _read_mxfp4(self, source: Source, dim: int, start: int, length: int) -> Tensor:
        """Reads a part, or experts [start, start + length) of a whole tensor."""
        stored = [self._slice(name(source.name)) for name in (mxfp4.blocks_name, mxfp4.scales_name)]
        if source.part is None:
            assert dim == 0
            blocks, scales = (each[start : start + length] for each in stored)
            return mxfp4.decode_blocks(blocks, scales).transpose(1, 2)
        first, count = touched(mxfp4.BLOCK, start, length) if dim == 1 else (start, length)
        stored_so = dataclasses.replace(source, part=dataclasses.replace(source.part, transposed=False))
        index = stored_so.stretch(dim, first, count)
        blocks, scales = (each[index] for each in stored)
        weights = mxfp4.decode_blocks(blocks, scales)
        return weights.narrow(1, start - first * mxfp4.BLOCK, length) if dim == 1 else weights

    def _file(self, name: str) -> Path:
        return self._files[mxfp4.blocks_name(name) if self._is_mxfp4(name) else name]

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

    def _read_fp8(self, source: Source, dim: int, start: int, length: int) -> Tensor:
        if source.part is not None:
            # Scales are of whole rows; a part has a stretch of them.
            first, rows = (start, length) if dim == 0 else (0, source.shape[0])
            read = self._read_fp8(source.whole, 0, source.part.offset + first, rows)
            return read if dim == 0 else read.narrow(dim, start, length)
        assert self._blocks is not None  # _check_fp8 has seen it
        scale = Source(scale_name(source.name), self.shape(scale_name(source.name)))
        touches = touched(self._blocks.size[dim], start, length)
        stretch, scales = (
            self._slice(each.name)[each.stretch(dim, *at)] for each, at in ((source, (start, length)), (scale, touches))
        )
        return decode(stretch, scales, self._blocks, dim, start)

    def _check_scales(self, source: Source) -> None:
        name = scale_name(source.name)
        scales = self._slice(name)[:]
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise ModelError(f"{self._files[name]}: {name} holds a scale that is not a finite number above 0")

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
