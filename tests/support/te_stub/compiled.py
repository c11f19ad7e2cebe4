"""Stand-ins for Transformer Engine's compiled module and for triton, sufficient to import Transformer Engine."""

from __future__ import annotations

import enum
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

from torch.utils._triton import has_triton_package


class _Constants(type):
    """A C++ enumeration or class: each requested name is a constant, counted from 0."""

    def __getattr__(cls, name: str) -> int:
        if name.startswith("__"):
            raise AttributeError(name)
        value = sum(isinstance(v, int) for v in vars(cls).values())
        setattr(cls, name, value)
        return value


# Enumerations whose members Transformer Engine reads during its import.
_ENUMERATIONS = {
    "DType": {
        "kByte": 0,
        "kInt32": 2,
        "kFloat32": 4,
        "kFloat16": 5,
        "kBFloat16": 6,
        "kFloat8E4M3": 7,
        "kFloat8E5M2": 8,
        "kFloat4E2M1": 10,
    },
    "NVTE_Fused_Attn_Backend": {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2},
}


class _Absent(types.ModuleType):
    """A module in which every name resolves; its functions raise when they are called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def no_body(*args: object, **kwargs: object) -> None:
            raise NotImplementedError(f"{self.__name__}.{name} was called, and has no stand-in")

        found = _Constants(name, (), {}) if name[0].isupper() else no_body
        setattr(self, name, found)
        return found


def _decorator(*args: Any, **kwargs: Any) -> Any:
    """Stands in for @triton.jit, @triton.jit(...) and @triton.autotune(...)."""
    return args[0] if args and callable(args[0]) else lambda kernel: kernel


def _triton() -> dict[str, types.ModuleType]:
    """Returns stand-ins for triton; kernels can be defined, but not launched."""
    names = ("triton", "triton.language", "triton.language.core", "triton.language.standard")
    modules = {name: _Absent(name) for name in names}
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    vars(modules["triton"]).update(
        jit=_decorator, autotune=_decorator, heuristics=_decorator, Config=dict, __version__="3.0.0"
    )
    return modules


def load(directory: Path) -> None:
    """Raises ImportError if Transformer Engine's Python code is not in `directory`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # does not load the shared library
    sys.path.insert(0, str(directory))
    extension = _Absent("transformer_engine_torch")
    vars(extension).update({name: enum.IntEnum(name, members) for name, members in _ENUMERATIONS.items()})
    # Older versions read it. Newer ones compare the enumeration's members with their own, and it is none of them.
    extension.NVTE_Fused_Attn_Backend.NVTE_F16_max512_seqlen = 0
    vars(extension).update(get_cudnn_version=lambda: 91500, get_num_cublas_streams=lambda: 1)
    sys.modules["transformer_engine_torch"] = extension
    if not has_triton_package():  # torch caches the answer and then does not use triton
        sys.modules.update(_triton())
    onnx = "transformer_engine.pytorch.onnx_extensions"  # needs two more packages, for export only
    sys.modules[onnx] = _Absent(onnx)
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or spec.loader is None:
        raise ImportError(f"no transformer_engine in {directory}")
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    import transformer_engine.common as common

    common.load_framework_extension = lambda framework: None  # the original would look for the shared library
    spec.loader.exec_module(package)
    import transformer_engine.pytorch  # noqa: F401  the package itself ignores an ImportError
