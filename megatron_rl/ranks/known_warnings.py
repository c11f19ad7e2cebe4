"""Hides the start-up warnings of Megatron-Core and torch that say nothing to a user of this program.

Each rank would print them, and bury what the run itself has to say. A warning is hidden only if its text and the module
that gives it are in the lists below, with the reason. Every other warning still shows. `python -W default` shows all.
"""

from __future__ import annotations

import functools
import logging
import sys
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class KnownWarning:
    """`module` and `text` are regular expressions; `text` matches from the start of the message."""

    category: type[Warning]
    module: str
    text: str


MEGATRON = r"megatron\.core\."

EVERYWHERE = (
    # Printed while Megatron-Core is imported. Apex is not used, and `engine.layers` decides about Transformer Engine:
    # `te` without it is an error, and versions.json records whether it is installed.
    KnownWarning(UserWarning, MEGATRON, "Transformer Engine and Apex are not installed"),
    KnownWarning(UserWarning, MEGATRON, "Apex is not installed. Falling back to Torch Norm"),
    # Megatron-Core 0.19 imports a configuration that nobody here asks for.
    KnownWarning(UserWarning, MEGATRON + "models.mimo", "MimoModelConfig is experimental"),
    # Python 3.12 says so of Megatron-Core's docstrings when it compiles them; the module is the file's path then.
    KnownWarning(SyntaxWarning, r".*megatron.core", "invalid escape sequence"),
    # Megatron-Core deprecates the default of its own option; no CUDA graphs are captured here.
    KnownWarning(UserWarning, MEGATRON + "transformer.transformer_config", "full scope is deprecated"),
    # Its optimizer asks every parameter for a gradient, views included, and expects None from those.
    KnownWarning(UserWarning, MEGATRON + "optimizer", r"The \.grad attribute of a Tensor that is not a leaf"),
    # Megatron-Core has one optimizer for experts and one for all other weights, which optim.freeze may all have.
    KnownWarning(UserWarning, MEGATRON + "optimizer", "WARNING: there is no optimizer on RANK"),
    # Its own way to free a buffer (engine/offload.py).
    KnownWarning(UserWarning, MEGATRON + "distributed", "TypedStorage is deprecated"),
    # Megatron-Core calls two collectives by the names that torch deprecates; they still work.
    KnownWarning(
        FutureWarning,
        r"torch\.distributed\.",
        r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated",
    ),
)
ON_CPU = (
    # Concerns the order of kernels on a GPU. There the advice may be worth taking, so it still shows.
    KnownWarning(UserWarning, MEGATRON + "tensor_parallel.layers", "When using sequence parallelism it is recommended"),
)


LOGGED = {
    # Megatron-Core 0.19 would have its hybrid model used instead.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Its own way to build the layers of plain PyTorch, by another spelling.
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    # The layout of the gradient buffers, which it then computes itself.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    # A CUDA build of torch on a machine with CUDA's compiler and no GPU. Nothing is compiled then.
    "torch.utils.cpp_extension": "No CUDA runtime is found",
}
"""Texts that Megatron-Core and torch log instead, by logger."""


def hide_known_warnings(known: tuple[KnownWarning, ...] = EVERYWHERE) -> None:
    """Does nothing if Python was started with -W or PYTHONWARNINGS: then the user has chosen."""
    if sys.warnoptions:
        return
    for warning in known:
        warnings.filterwarnings("ignore", warning.text, warning.category, warning.module)


def hide_known_records() -> None:
    """As hide_known_warnings, for LOGGED."""
    if sys.warnoptions:
        return
    for name, text in LOGGED.items():
        logging.getLogger(name).addFilter(functools.partial(_is_other, text))


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(text)
