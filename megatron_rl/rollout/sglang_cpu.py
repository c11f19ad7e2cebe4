"""Runs SGLang's server on a machine without a GPU: sglang_launch, with stand-ins for GPU packages.

    python -m megatron_rl.rollout.sglang_cpu --model-path DIR --device cpu ...

`megatron_rl.rollout.server` writes this command, for the CPU only. Importing this module elsewhere does nothing.
SGLang spawns its scheduler and detokenizer, and each imports torch and SGLang again. Here they are forked, which halves
the time to start: at that time there is no CUDA context and no thread that a fork could lose. With data parallelism a
thread starts the schedulers, so they are spawned. A spawned process runs its parent's main module again under the name
`__mp_main__`, so it has the stand-ins too.

SGLang imports GPU packages that its CPU path does not use. A stand-in serves such an import only if the real package is
missing, or cannot be loaded without CUDA. Its names resolve, and raise if they are called; the few names that must
work while modules are defined are listed below. A stand-in cannot cause a wrong result, because nothing in it runs.
tests/server/test_rollout_logprobs.py compares the server's numbers with transformers.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import sys
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from megatron_rl.garbage import collect_rarely
from megatron_rl.heap import keep_freed_memory
from megatron_rl.rollout.sglang_launch import launch

if TYPE_CHECKING:
    from torch import Tensor


class Missing:
    """A name in a GPU package. Its attributes resolve; a call or a kernel launch raises."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Missing:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return Missing(f"{self._name}.{attribute}")

    def __getitem__(self, grid: object) -> Missing:
        return self  # triton launches by kernel[grid](...)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        raise NotImplementedError(f"{self._name} was called, but there is no GPU and no stand-in for it on the CPU")


class StandIn(types.ModuleType):
    """A module of a missing GPU package; `given` are the names that work."""

    def __init__(self, name: str, version: str, given: Mapping[str, object]) -> None:
        super().__init__(name)
        self.__version__ = version
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")


def jit(function: Callable[..., object] | None = None, **options: object) -> Any:
    """Stands in for `@triton.jit` and `@triton.jit(...)`."""
    if function is None:
        return jit
    return Missing(f"triton kernel {getattr(function, '__name__', function)}")


def decorator_factory(*args: object, **kwargs: object) -> Any:
    """Stands in for `@triton.autotune(...)` and `@triton.heuristics(...)` above a kernel."""
    return lambda kernel: kernel


TRITON: dict[str, object] = {
    "jit": jit,
    "autotune": decorator_factory,
    "heuristics": decorator_factory,
    "Config": dict,  # the configurations passed to autotune
    "cdiv": lambda a, b: -(a // -b),
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
}

# Package -> (version, {module: names that work}).
PACKAGES: dict[str, tuple[str, dict[str, dict[str, object]]]] = {
    # Kernels compiled for CUDA. On the CPU layers use `forward_native`, in plain PyTorch.
    "sgl_kernel": ("0.0.0", {}),
    # Image transforms, imported for multimodal models. The package is not installed, because it would replace torch.
    "torchvision": ("0.0.0", {}),
    # About 400 modules define kernels when they are imported. SGLang knows that 3.0 has no `triton.knobs`.
    "triton": ("3.0.0", {"triton": TRITON, "triton.language": {"constexpr": lambda value: value}}),
}
ABSENT = ("triton.knobs",)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the stand-ins of some packages."""

    def __init__(self, packages: Collection[str]) -> None:
        self._packages = packages

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self._packages or fullname in ABSENT:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        version, given = PACKAGES[spec.name.partition(".")[0]]
        return StandIn(spec.name, version, given.get(spec.name, {}))

    def exec_module(self, module: types.ModuleType) -> None: ...


def install_stand_ins() -> None:
    """Puts the stand-ins of missing packages last on sys.meta_path, and of those that cannot be loaded first."""
    installed = [package for package in PACKAGES if importlib.util.find_spec(package) is not None]
    sys.meta_path.append(Finder(PACKAGES.keys() - set(installed)))
    sys.meta_path.insert(0, Finder({package for package in installed if not _loads(package)}))


def _loads(package: str) -> bool:
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError):  # its libraries want a driver
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            del sys.modules[name]
        return False
    return True


def register_hooks() -> None:
    """Replaces functions through SGLang's own registry.

    Host buffers are not registered with CUDA (`--enable-return-routed-experts`), sequences attend together, experts
    take one product for all of them, requests are sampled by their seeds, weights are loaded while more arrive,
    processes are forked, and two steps of some models are computed in plain PyTorch, in fp32 as SGLang's kernels do:
    the gate of the expert that every token visits, and norms over all heads.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from megatron_rl.rollout import sglang_cpu_attention, sglang_cpu_experts, sglang_cpu_sampling, sglang_cpu_weights

    HookRegistry.register(
        "sglang.srt.mem_cache.pool_host.common._cuda_host_register",
        lambda buffer, registration_granularity_bytes=None: None,
        HookType.REPLACE,
    )
    backend = "sglang.srt.layers.attention.torch_native_backend.TorchNativeAttnBackend"
    HookRegistry.register(f"{backend}.init_forward_metadata", sglang_cpu_attention.begin_forward, HookType.BEFORE)
    HookRegistry.register(f"{backend}._run_sdpa_forward_extend", sglang_cpu_attention.extend, HookType.AROUND)
    HookRegistry.register(f"{backend}._run_sdpa_forward_decode", sglang_cpu_attention.decode, HookType.AROUND)
    experts = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
    HookRegistry.register(experts, sglang_cpu_experts.forward, HookType.AROUND)
    batch = "sglang.srt.sampling.sampling_batch_info.SamplingBatchInfo.from_schedule_batch"
    HookRegistry.register(batch, sglang_cpu_sampling.take_seeds, HookType.AFTER)
    sampler = "sglang.srt.layers.sampler.multinomial_with_seed"
    HookRegistry.register(sampler, sglang_cpu_sampling.sample, HookType.REPLACE)
    filtered = "sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch"
    HookRegistry.register(filtered, sglang_cpu_sampling.sample_filtered, HookType.AROUND)
    gate = "sglang.kernels.ops.elementwise.elementwise._launch_fused_gate_sigmoid_mul"
    HookRegistry.register(gate, add_gated, HookType.REPLACE)
    norms = "sglang.srt.models.minimax_m2"
    HookRegistry.register(f"{norms}.rms_sumsq_serial", sums_of_squares, HookType.REPLACE)
    HookRegistry.register(f"{norms}.rms_apply_serial", norm_heads, HookType.REPLACE)
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    receives = f"{updater}._receive_bucketed_weights_from_distributed"
    HookRegistry.register(receives, sglang_cpu_weights.receive, HookType.REPLACE)
    HookRegistry.register(f"{updater}.load_weights_from_distributed", sglang_cpu_weights.load_later, HookType.AROUND)
    session = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager.end_weight_update"
    HookRegistry.register(session, sglang_cpu_weights.end, HookType.AROUND)
    launcher = "sglang.srt.entrypoints.engine.Engine._launch_scheduler_processes"
    HookRegistry.register(launcher, fork_processes, HookType.BEFORE)


def add_gated(hidden: Tensor, gate: Tensor, shared: Tensor, output: Tensor, *, do_add: bool) -> None:
    """Adds the output `shared` of an expert [T, H] to `output`, or puts it there, times a sigmoid of its token.

    hidden [T, H], gate [H]. Computes in fp32, as SGLang's kernel does.
    """
    gated = (hidden.float() @ gate.float()).sigmoid().unsqueeze(-1) * shared.float()
    output.copy_(output.float() + gated if do_add else gated)


def sums_of_squares(query: Tensor, key: Tensor) -> Tensor:
    """query [T, Q] and key [T, K] of this rank -> [2, T] fp32, which ranks add up."""
    import torch

    return torch.stack([each.float().square().sum(-1) for each in (query, key)])


def norm_heads(
    query: Tensor, key: Tensor, of_query: Tensor, of_key: Tensor, squares: Tensor, tp_world: int = 1, eps: float = 1e-5
) -> tuple[Tensor, ...]:
    """Norms query [T, Q] and key [T, K] with weights [Q] and [K], by the `squares` [2, T] of all ranks."""
    pairs = zip((query, key), (of_query, of_key), squares, strict=True)
    return tuple(
        (each.float() * (total / (each.shape[-1] * tp_world) + eps).rsqrt().unsqueeze(-1) * weight.float()).to(
            each.dtype
        )
        for each, weight, total in pairs
    )


def fork_processes(engine: object, server_args: Any, *args: object, **options: object) -> None:
    """Makes SGLang fork its processes if it starts them from its main thread."""
    if server_args.dp_size == 1:
        multiprocessing.set_start_method("fork", force=True)


if __name__ in ("__main__", "__mp_main__"):
    collect_rarely()
    keep_freed_memory()
    install_stand_ins()
    register_hooks()
if __name__ == "__main__":
    launch(sys.argv[1:])
