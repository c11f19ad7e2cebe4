"""The order of writes of a checkpoint, failed writes and deletions, and digests of a model's files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.disk import DiskError, writes
from megatron_rl.engine.checkpoint import layout_record
from megatron_rl.engine.checkpoint_writer import CheckpointWriter
from megatron_rl.engine.manifest import (
    FORMAT,
    Identity,
    Manifest,
    State,
    checkpoints,
    prune,
    read_manifest,
    remove_partial,
)
from megatron_rl.engine.shard_file import ShardReader, write_tensors
from megatron_rl.models.identity import SAMPLE_BYTES, WHOLE_BYTES, file_digests

IDENTITY = Identity(run="0" * 32, models={}, data={})


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def save(root: Path, step: int, keep: int = 9, tensor: torch.Tensor | None = None) -> None:
    """Writes a checkpoint as a run does, and ends as a run that fails."""
    manifest = Manifest(format=FORMAT, layout={"tp": 1}, identity=IDENTITY, files=[], state=State(step=step, cursor={}))
    writer = CheckpointWriter(root, dist.distributed_c10d._get_default_group(), keep)
    try:
        writer.start(step, {"weights": torch.arange(1000.0) if tensor is None else tensor}, {"steps": 3}, manifest)
        writer.wait()
    except DiskError:
        writer.close(complete=False)
        raise


def test_given_stages_are_part_of_the_layout() -> None:
    """Under other stages a rank would hold the optimizer state of other layers."""
    engine = SimpleNamespace(dtype="fp32", overlap="none")
    plain, given = (
        layout_record({"policy": SimpleNamespace(layout=Layout.resolve(config, 1), engine=engine)})  # type: ignore[dict-item]
        for config in (ParallelConfig(), ParallelConfig(stage_layers=(3,)))
    )
    assert given == {**plain, "stage_layers": [3]}


def test_all_files_are_synced_before_the_checkpoint_gets_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "checkpoints"
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"rename to {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save(root, 1)
    assert events == [
        "sync rank-00000.safetensors",
        "sync step-000001.partial",
        "sync .rank-00000.json.partial",
        "rename to rank-00000.json",
        "sync .manifest.json.partial",
        "rename to manifest.json",
        "sync step-000001.partial",
        "sync step-000001.partial",
        "rename to step-000001",
        "sync checkpoints",
    ]
    loaded = ShardReader(root / "step-000001" / "rank-00000.safetensors")
    assert loaded.state == {"steps": 3}
    assert torch.equal(loaded.read("weights"), torch.arange(1000.0))
    assert torch.equal(loaded.stretch("weights", 10, 5), torch.arange(10.0, 15.0))
    (entry,) = read_manifest(root / "step-000001").files
    assert entry.sha256 == hashlib.sha256((root / "step-000001" / "rank-00000.safetensors").read_bytes()).hexdigest()
    assert sorted(path.name for path in (root / "step-000001").iterdir()) == ["manifest.json", "rank-00000.safetensors"]


def test_a_file_that_does_not_fit_on_the_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="No space left on device"):
        write_tensors(Path("/dev/full"), {"weights": torch.arange(1000.0)}, {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a/b": torch.arange(7).to(dtype), "none": torch.zeros(0, dtype=dtype), "x": torch.ones(3, dtype=dtype)}
    entry = write_tensors(tmp_path / "file", tensors, {"text": "\u00e9", "number": 0.1})
    found = load_file(tmp_path / "file")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in tensors.items())
    assert ShardReader(tmp_path / "file").state == {"text": "\u00e9", "number": 0.1}
    assert entry["bytes"] == (tmp_path / "file").stat().st_size


def test_a_name_that_is_too_long_is_told_as_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 300)
    with (
        pytest.raises(DiskError, match=rf"it was not written: {folder}: file name too long; .* free there$"),
        writes("it", folder),
    ):
        folder.mkdir()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("call", range(10))
def test_a_failed_write_keeps_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, number: int
) -> None:
    """Each of the system calls may fail."""
    root = tmp_path / "checkpoints"
    save(root, 1)
    calls: list[str] = []

    def fails_in_turn(name: str) -> Any:
        real = getattr(os, name)

        def maybe(*arguments: Any) -> Any:
            calls.append(name)
            if len(calls) == call + 1:
                raise OSError(number, os.strerror(number))
            return real(*arguments)

        return maybe

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, fails_in_turn(name))
    with pytest.raises(DiskError, match=rf"step-000002 was not written: .*{os.strerror(number).lower()}.*free there"):
        save(root, 2)
    monkeypatch.undo()
    assert (root / "step-000001").is_dir()
    assert not list(root.glob("*.partial"))
    read_manifest(root / "step-000001")


def test_an_interrupted_deletion_leaves_no_incomplete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A partly deleted checkpoint must not look complete."""
    for step in (1, 2, 3):
        save(tmp_path, step)

    def cut_off(path: Path) -> None:
        (path / "rank-00000.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-000003"]
    remove_partial(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000002", "step-000003"]


# ---- models ----------------------------------------------------------------------------------------------------


def test_file_digests_tell_a_models_files_apart(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("not read")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(WHOLE_BYTES + 10_000_001)  # sparse
    first = file_digests(tmp_path)
    assert sorted(first) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert file_digests(tmp_path) == first
    assert first["model.safetensors"].startswith("sampled:")
    (tmp_path / "longer.safetensors").touch()
    os.truncate(tmp_path / "longer.safetensors", WHOLE_BYTES + 10_000_002)  # as empty as the other
    assert file_digests(tmp_path)["longer.safetensors"] != first["model.safetensors"]
    (tmp_path / "longer.safetensors").unlink()
    for at in (0, WHOLE_BYTES + 10_000_000, SAMPLE_BYTES - 1):
        with (tmp_path / "model.safetensors").open("r+b") as file:
            file.seek(at)
            file.write(b"\1")
        changed = file_digests(tmp_path)
        assert changed["model.safetensors"] != first["model.safetensors"], at
        first = changed
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.truncate(WHOLE_BYTES + 10_000_002)
    assert file_digests(tmp_path)["model.safetensors"] != first["model.safetensors"]
    (tmp_path / "config.json").write_text("{ }")
    assert file_digests(tmp_path)["config.json"] != first["config.json"]
