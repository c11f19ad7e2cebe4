"""Damaged run directories: manifests, configurations, checkpoint directories and metrics files with changed bytes and
values. They raise only the project's own errors, and nothing damaged or of another run is accepted.

The tests call the functions that a resume calls before it changes anything, on one rank and without a model.
"""

from __future__ import annotations

import collections
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import torch.distributed as dist
from fuzzing import FEW, MANY
from hypothesis import given
from hypothesis import strategies as st

from megatron_rl.config.layout import Layout
from megatron_rl.config.schema import ParallelConfig
from megatron_rl.engine.manifest import (
    CheckpointError,
    DamagedError,
    Identity,
    Manifest,
    ModelIdentity,
    ShardFile,
    State,
    check_identity,
    checkpoints,
    read_manifest,
)
from megatron_rl.errors import UserError
from megatron_rl.lab.run import RunDir, read_metrics

RUN = "0123456789abcdef" * 2
CONFIG = """run_dir: runs/a
seed: 7
optim:
  lr: 1.0e-06
  betas:
  - 0.9
  - 0.95
train:
  steps: 10
  mini_batches: 2
checkpoint:
  every: 1
rollout:
  dynamic_sampling: null
"""
LAYOUT: dict[str, int | str] = {"tp": 1, "pp": 1, "vpp": 1, "cp": 1, "ep": 1, "etp": 1, "dp": 1, "dtype": "fp32"}
IDENTITY = Identity(
    run=RUN,
    models={
        "policy": ModelIdentity(
            key="model.path",
            architecture={"num_layers": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-6, "dense_layers": []},
            files={"config.json": "a" * 64, "model.safetensors": "b" * 64},
        )
    },
    data={"data.train": "sha256:" + "c" * 64},
)
SHARD = b"weights" * 100

counts: collections.Counter[str] = collections.Counter()
"""Outcomes of the damaged directories, shown with `pytest -s`."""


def manifest(step: int) -> Manifest:
    import hashlib

    shard = ShardFile(name="rank-00000.safetensors", bytes=len(SHARD), sha256=hashlib.sha256(SHARD).hexdigest())
    cursor = {"seed": 7, "epoch": 0, "position": step}
    return Manifest(format=5, layout=LAYOUT, identity=IDENTITY, files=[shard], state=State(step=step, cursor=cursor))


METRICS = b"".join(orjson.dumps({"step": s, "mini_batch": m, "loss": s / 7}) + b"\n" for s in (1, 2, 3) for m in (0, 1))
FILES: dict[str, bytes] = {
    "run.json": orjson.dumps({"id": RUN}),
    "config.yaml": CONFIG.encode(),
    "metrics.jsonl": METRICS,
    **{f"checkpoints/step-{step:06d}/manifest.json": manifest(step).to_bytes() for step in (1, 2, 3)},
    **{f"checkpoints/step-{step:06d}/rank-00000.safetensors": SHARD for step in (1, 2, 3)},
}
MUTABLE = [name for name in FILES if not name.startswith("checkpoints/step-000001")]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    print(dict(counts))


def networks() -> Any:
    place = SimpleNamespace(rank=0, control=dist.group.WORLD)
    layout = Layout.resolve(ParallelConfig(), 1)
    return {"policy": SimpleNamespace(place=place, layout=layout, engine=SimpleNamespace(dtype="fp32", overlap="none"))}


# ---- damage ----------------------------------------------------------------------------------------------------


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["flip", "insert", "delete", "cut", "repeat"]))
        if kind == "flip" and at < len(data):
            data[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            data[at:at] = draw(
                st.binary(max_size=5) | st.sampled_from([b"\n", b"{", b"]", b'"', b": ", b"!!int x", b"&a", b"*a"])
            )
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 30))]
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
    return bytes(data)


@st.composite
def changed_values(draw: st.DrawFn, content: bytes) -> bytes:
    """Replaces, removes or adds one value of a JSON object at any depth, with or without a correct digest."""
    tree = orjson.loads(content)
    node: Any = tree
    while True:
        inner = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not inner:
            return content + b" "
        key = draw(st.sampled_from(inner))
        if isinstance(node[key], dict | list) and draw(st.booleans()):
            node = node[key]
            continue
        break
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        node[key] = draw(json_values)
    elif action == "remove":
        del node[key]
    elif isinstance(node, dict):
        node[draw(st.text(max_size=6))] = draw(json_values)
    else:
        node.append(draw(json_values))
    try:
        return orjson.dumps(tree)
    except TypeError:  # integers beyond 64 bits
        return content[:-1]


@st.composite
def damages(draw: st.DrawFn) -> dict[str, bytes | None]:
    """Draws the directory's files, with one to three of them changed or deleted (None)."""
    files: dict[str, bytes | None] = dict(FILES)
    for name in draw(st.lists(st.sampled_from(MUTABLE), min_size=1, max_size=3, unique=True)):
        content = FILES[name]
        if draw(st.integers(0, 9)) == 0:
            files[name] = None
        elif name.endswith("manifest.json") and draw(st.booleans()):
            files[name] = draw(changed_values(content))
        else:
            files[name] = draw(changed_bytes(content))
    if draw(st.integers(0, 4)) == 0:
        name = draw(
            st.sampled_from(["step-000002-good", "step-copy", "step-000009", "step-9", "step-000004.partial", "x"])
        )
        for part in ("manifest.json", "rank-00000.safetensors"):
            files[f"checkpoints/{name}/{part}"] = FILES[f"checkpoints/step-000003/{part}"]
    return files


def check(files: dict[str, bytes | None]) -> None:
    """Checks that a resume takes an undamaged checkpoint or raises a UserError, and changes no file."""
    from megatron_rl.engine.checkpoint import find_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "run"
        for name, content in files.items():
            if content is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_bytes(content)
        before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        run, refusal = None, ""
        try:
            run = RunDir.open(root, CONFIG, resume=True)
            now = IDENTITY.model_copy(update={"run": run.id})
            found = find_checkpoint(run.checkpoints, networks(), now)
            if found.directory is None:
                counts["none whole"] += 1
            else:
                counts[f"accepted, {len(found.damaged)} passed over"] += 1
                check_accepted(found.directory, found.manifest, run)
            read_metrics(run.metrics_file) if run.metrics_file.exists() else []
        except (UserError, FileNotFoundError) as error:  # the latter: no config.yaml
            refusal = str(error)
            counts[f"refused, {type(error).__name__}"] += 1
        finally:
            if run is not None:
                run.close()
        assert not refusal or str(root) in refusal, refusal
        assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def check_accepted(directory: Path, found: Manifest | None, run: RunDir) -> None:
    """Compares the accepted checkpoint with the written one, and checks that it is of this run."""
    assert found is not None
    step = int(directory.name[5:])
    assert orjson.loads(found.to_bytes()) == orjson.loads(FILES[f"checkpoints/step-{step:06d}/manifest.json"])
    assert (directory / "rank-00000.safetensors").read_bytes() == SHARD
    assert run.id == RUN


@FEW
@given(damages())
def test_damage_in_a_run_directory_is_refused_or_skipped(files: dict[str, bytes | None]) -> None:
    check(files)


@pytest.mark.slow
@MANY
@given(damages())
def test_damage_in_many_run_directories_is_refused_or_skipped(files: dict[str, bytes | None]) -> None:
    check(files)


def test_an_undamaged_run_directory_is_accepted() -> None:
    counts.clear()
    check(dict(FILES))
    assert counts == {"accepted, 0 passed over": 1}


# ---- cases found by fuzzing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        FILES["checkpoints/step-000003/manifest.json"].replace(b'"step": 3', b'"step": 2'),
        FILES["checkpoints/step-000003/manifest.json"].replace(b'"position": 3', b'"position": 0'),
        FILES["checkpoints/step-000003/manifest.json"].replace(b'"format"', b'`"format"'),
        FILES["checkpoints/step-000003/manifest.json"].replace(b'"files": [', b'"files": [true, '),
        FILES["checkpoints/step-000003/manifest.json"][:100],
        b"",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_a_damaged_manifest_gives_one_error(tmp_path: Path, content: bytes) -> None:
    directory = tmp_path / "step-000003"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json: (damaged|format None)"):
        read_manifest(directory)


def test_a_manifest_of_an_older_format_is_refused_and_not_skipped(tmp_path: Path) -> None:
    directory = tmp_path / "step-000003"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(orjson.dumps({"format": 2, "layout": {}, "files": [], "state": {}}))
    with pytest.raises(CheckpointError, match="format 2, this version reads 5") as error:
        read_manifest(directory)
    assert not isinstance(error.value, DamagedError)


def test_a_manifest_in_the_directory_of_another_step_counts_as_damaged(tmp_path: Path) -> None:
    directory = tmp_path / "step-000009"
    directory.mkdir()
    (directory / "manifest.json").write_bytes(FILES["checkpoints/step-000003/manifest.json"])
    with pytest.raises(DamagedError, match="of step 3, but its directory is step-000009"):
        read_manifest(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"run": "f" * 32}, f"of another run \\({RUN}\\) than this run_dir's"),
        ({"data": {"data.train": "x"}}, "data.train: not the data set that the run began with"),
        ({"data": {**IDENTITY.data, "data.heldout": "x"}}, "data.heldout: not the data set"),
        ({"models": {}}, "of policy, but this run has"),
    ],
)
def test_run_data_model_and_dtype_must_match_the_manifest(change: dict[str, Any], words: str) -> None:
    directory = Path("step-000003")
    check_identity(directory, manifest(3), LAYOUT, IDENTITY)
    with pytest.raises(CheckpointError, match=words):
        check_identity(directory, manifest(3), LAYOUT, IDENTITY.model_copy(update=change))
    check_identity(directory, manifest(3), {**LAYOUT, "tp": 2}, IDENTITY)
    with pytest.raises(CheckpointError, match=r"written with engine\.dtype fp32, resumed with bf16"):
        check_identity(directory, manifest(3), {**LAYOUT, "dtype": "bf16"}, IDENTITY)


def test_checkpoints_beyond_a_million_steps_are_in_order(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 2):
        directory = tmp_path / f"step-{step:06d}"
        directory.mkdir()
        (directory / "manifest.json").touch()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000002", "step-999999", "step-1000000"]
