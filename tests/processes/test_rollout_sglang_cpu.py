"""The CPU layer's stand-ins: names resolve, calls raise, and other processes do not see them.

test_rollout_logprobs.py checks SGLang's numbers with these stand-ins. Each check here runs in its own process.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from megatron_rl.rollout.sglang_cpu import PACKAGES

INSTALL = "import sys; from megatron_rl.rollout import sglang_cpu; sglang_cpu.install_stand_ins()\n"
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(package) for package in PACKAGES), reason="the real packages are installed"
)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_module_installs_nothing() -> None:
    ended = run("import megatron_rl.rollout.sglang_cpu; import sgl_kernel")
    assert "ModuleNotFoundError: No module named 'sgl_kernel'" in ended.stderr


@pytest.mark.parametrize(
    "call",
    [
        "import sgl_kernel; sgl_kernel.topk_softmax(1)",
        "from sgl_kernel.kvcacheio import transfer; transfer()",
        "import torchvision.transforms as t; t.functional.resize(1)",
        "import triton; triton.testing.do_bench(1)",
        "import triton.language as tl; tl.load(1)",
        "import triton\n@triton.jit\ndef kernel(x): ...\nkernel[(1,)](1)",
        "import triton\n@triton.jit(debug=True)\ndef kernel(x): ...\nkernel(1)",
        "import triton\n@triton.autotune(configs=[triton.Config({}, num_warps=4)], key=[])\n"
        "@triton.jit\ndef kernel(x): ...\nkernel[lambda meta: (1,)](1)",
        "import triton\n@triton.heuristics({})\n@triton.jit\ndef kernel(x): ...\nkernel[(1,)](1)",
    ],
)
def test_a_stand_in_raises_when_it_is_called(call: str) -> None:
    ended = run(INSTALL + call)
    assert "NotImplementedError: " in ended.stderr
    assert "was called, but there is no GPU" in ended.stderr


def test_the_few_implemented_stand_ins_work() -> None:
    ended = run(
        INSTALL + "import triton, triton.language as tl\n"
        "assert [triton.cdiv(a, 4) for a in (0, 1, 4, 5)] == [0, 1, 1, 2]\n"
        "assert [triton.next_power_of_2(n) for n in (1, 2, 3, 4, 5)] == [1, 2, 4, 4, 8]\n"
        "assert tl.constexpr(7) == 7\n"
        "try: import triton.knobs\n"
        "except ImportError: pass\n"
        "else: raise AssertionError('triton.knobs is there')\n"
    )
    assert ended.returncode == 0, ended.stderr


def test_an_installed_package_wins_over_its_stand_in(tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel.py").write_text("real = 1")
    ended = run(INSTALL + "import sgl_kernel; assert sgl_kernel.real == 1", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_stand_in_serves_for_a_package_that_cannot_be_loaded(tmp_path: Path, error: str) -> None:
    """SGLang's kernels for GPUs need libcuda.so.1."""
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel" / "__init__.py").write_text("import sgl_kernel.utils, sgl_kernel.kernels\n")
    (tmp_path / "sgl_kernel" / "utils.py").touch()  # a part that loads
    (tmp_path / "sgl_kernel" / "kernels.py").write_text(f"raise {error}('libcuda.so.1: cannot open')\n")
    for part in ("utils", "kernels"):
        code = f"from sgl_kernel.{part} import topk_softmax\ntopk_softmax(1)"
        ended = run(INSTALL + code, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert f"sgl_kernel.{part}.topk_softmax was called, but there is no GPU" in ended.stderr


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.parametrize("package", PACKAGES)
def test_sglang_cannot_be_imported_without_each_stand_in(package: str) -> None:
    """This fails if an upgrade of SGLang makes a stand-in unnecessary."""
    ended = run(
        f"from megatron_rl.rollout import sglang_cpu\ndel sglang_cpu.PACKAGES[{package!r}]\n{INSTALL}"
        "import sglang.launch_server, sglang.srt.managers.scheduler, sglang.srt.models.qwen3_moe",
        SGLANG_USE_CPU_ENGINE="1",
        TORCHDYNAMO_DISABLE="1",
    )
    assert ended.returncode == 1
    assert f"No module named '{package}" in ended.stderr
