"""How a model directory stores quantised weights, read from its config.json. Importable without torch.

An Architecture says nothing of it: the weights that are read are those of a model that is not quantised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_rl.models.fields import MAX_INTEGER, JsonFields, ModelError, read_json_object

FIELD = "quantization_config"
"""The object in config.json that tells engines of quantised weights."""
_LISTS = ("modules_to_not_convert", "ignored_layers", "modules_to_convert")


@dataclass(frozen=True)
class Fp8Blocks:
    """Weights [rows, columns] in fp8 e4m3 with one scale per block of `size` rows and columns.

    DeepSeek-V3, Kimi-K2, MiniMax-M2 and Qwen3-*-FP8 are published so [2412.19437, section 3.3.2]. Which weights are in
    fp8, the tensors' own dtypes say.
    """

    size: tuple[int, int]

    def count(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the scales of a weight: blocks down and across. Those at the edges may be smaller."""
        return tuple(-(-extent // size) for extent, size in zip(shape, self.size, strict=True))


@dataclass(frozen=True)
class Mxfp4:
    """Weights of experts in mxfp4, as gpt-oss is published: see models/mxfp4.py. Which weights, the tensors' names
    say."""


Quantisation = Fp8Blocks | Mxfp4


def take_quantisation(fields: JsonFields) -> Quantisation | None:
    """Takes quantization_config; returns None if the model is not quantised.

    Raises ModelError for any other form than mxfp4 or fp8 with scales per block, and for a field that is unknown.
    """
    content = fields.left.pop(FIELD, None)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise fields.error(FIELD, content, "an object, or null")
    quantised = JsonFields(fields.path, content, prefix=f"{FIELD}.")
    method = quantised.left.pop("quant_method", None)
    if method not in ("fp8", "mxfp4"):
        raise quantised.error("quant_method", method, '"fp8" or "mxfp4"; no other value is supported')
    quantised.must_be("dequantize", False, True)
    for name in _LISTS:
        modules = quantised.left.pop(name, None) or []
        if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
            raise quantised.error(name, modules, "a list of names of modules, or null")
    kind = Mxfp4() if method == "mxfp4" else _fp8(quantised)
    quantised.end()
    return kind


def _fp8(quantised: JsonFields) -> Fp8Blocks:
    quantised.must_be("fmt", "e4m3", "float8_e4m3fn")
    # Activations are not quantised here. Engines round the scales of activations as scale_fmt says.
    quantised.must_be("activation_scheme", "dynamic")
    quantised.must_be("scale_fmt", None, "float", "ue8m0")
    return Fp8Blocks(_block_size(quantised))


def read_quantisation(model_dir: Path) -> Quantisation | None:
    """Reads how the weights in model_dir are stored; returns None if they are not quantised. Raises ModelError."""
    path = Path(model_dir) / "config.json"
    return take_quantisation(JsonFields(path, read_json_object(path)))


def refuse_quantised(model_dir: Path, reason: str) -> None:
    """Raises ModelError if the model is quantised, with the command that writes a copy in bf16."""
    found = read_quantisation(model_dir)
    if found is not None:
        kind = "fp8" if isinstance(found, Fp8Blocks) else "mxfp4"
        raise ModelError(
            f"{model_dir} has weights in {kind}, {reason}; write a copy in bf16 by `megatron-rl dequantise {model_dir} "
            "OUT` and give that"
        )


def _block_size(quantised: JsonFields) -> tuple[int, int]:
    size = quantised.left.pop("weight_block_size", None)
    if (
        not isinstance(size, list)
        or len(size) != 2
        or any(type(n) is not int or not 0 < n <= MAX_INTEGER for n in size)
    ):
        expected = "rows and columns of a block, such as [128, 128]; one scale for a whole tensor is not supported"
        raise quantised.error("weight_block_size", size, expected)
    return size[0], size[1]
