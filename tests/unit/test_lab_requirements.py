"""The frozen environments agree with pyproject.toml and with each other."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from paths import ROOT

CPU, CPU_PY312, NODEPS, GYM, TE_STUB, OLDER_TE_STUB = (
    ROOT / "requirements" / f"{name}.txt"
    for name in ("cpu", "cpu-py312", "cpu-nodeps", "gym", "te-stub", "te-stub-before-2.13")
)


def pins(file: Path) -> dict[str, Version]:
    """Returns versions by name; every line must be an exact pin."""
    found: dict[str, Version] = {}
    for line in file.read_text().splitlines():
        if not (text := line.partition("#")[0].strip()):
            continue
        requirement = Requirement(text)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{file.name}: {text} is not pinned"
        name = canonicalize_name(requirement.name)
        assert name not in found, f"{file.name}: {name} is pinned twice"
        found[name] = Version(specifier.version)
    return found


def declared(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [text for e in extras for text in project["optional-dependencies"][e]]
    return [Requirement(text) for text in texts]


@pytest.mark.parametrize("file", [CPU, CPU_PY312], ids=lambda file: file.name)
def test_every_declared_dependency_is_pinned_in_its_range(file: Path) -> None:
    frozen = pins(file) | pins(GYM)
    for requirement in declared("dev", "lab", "environments"):
        name = canonicalize_name(requirement.name)
        assert name in frozen, f"{file.name} does not pin {requirement.name} of pyproject.toml"
        assert requirement.specifier.contains(frozen[name], prereleases=True), (
            f"{file.name} pins {name}=={frozen[name]}, but pyproject.toml asks for {requirement}"
        )


def test_sglang_is_pinned_in_its_range() -> None:
    (requirement,) = (r for r in declared("sglang") if r.name == "sglang")
    assert requirement.specifier.contains(pins(NODEPS)["sglang"])


def test_two_versions_of_transformer_engine_are_pinned_in_its_range_and_in_their_own_files() -> None:
    (requirement,) = declared("te")[len(declared()) :]
    older, newer = (pins(file)[canonicalize_name(requirement.name)] for file in (OLDER_TE_STUB, TE_STUB))
    assert older < Version("2.13") <= newer
    assert requirement.specifier.contains(older)
    assert requirement.specifier.contains(newer)
    assert not pins(TE_STUB).keys() & (pins(CPU) | pins(NODEPS)).keys()


def test_pins_for_both_python_versions_differ_only_in_megatron_core() -> None:
    cpu, cpu_py312 = pins(CPU), pins(CPU_PY312)
    assert {name for name in cpu | cpu_py312 if cpu.get(name) != cpu_py312.get(name)} == {"megatron-core"}
    assert cpu["megatron-core"] < cpu_py312["megatron-core"]


@pytest.mark.parametrize("file", [CPU, CPU_PY312, NODEPS], ids=lambda file: file.name)
def test_no_pinned_package_needs_cuda_or_replaces_torch(file: Path) -> None:
    forbidden = {"torchvision", "torchaudio", "triton", "sgl-kernel", "sglang-kernel", "flashinfer-python"}
    assert not {name for name in pins(file) if name in forbidden or name.startswith(("nvidia-", "cuda-"))}


@pytest.mark.parametrize("file", [CPU, CPU_PY312], ids=lambda file: file.name)
def test_torch_is_the_first_pin(file: Path) -> None:
    """Hosts that install torch from another index read its version from the first line."""
    assert next(iter(pins(file))) == "torch"
