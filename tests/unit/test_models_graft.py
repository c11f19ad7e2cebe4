"""A graft is one model with another's weights of some kinds, tensor by tensor; anything else is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from model_directories import edit, files_of, make_sharded
from models_reference import TINY
from small_disk import small_disk
from tiny_models import make_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner
from weight_kinds import kind_of

from megatron_rl.cli import app
from megatron_rl.disk import DiskError
from megatron_rl.errors import FileInTheWayError, UserError
from megatron_rl.models import graft as module
from megatron_rl.models.graft import Graft, graft
from megatron_rl.models.kinds import POLICY_KINDS

GATE = "model.layers.0.mlp.gate.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one architecture: `donor` in one file and `base` in many."""
    root = tmp_path_factory.mktemp("graft")
    make_tiny_model(root / "donor", **{**TINY["qwen3_moe"], "seed": 7})
    make_sharded(root / "base")
    return root


@pytest.fixture
def pair(models: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies that a test may change."""
    return tuple(Path(shutil.copytree(models / name, tmp_path / name)) for name in ("donor", "base"))  # type: ignore[return-value]


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("kinds", [("router",), ("embedding", "other"), ("expert", "attention"), POLICY_KINDS])
def test_a_graft_is_the_base_with_the_donors_weights(models: Path, tmp_path: Path, kinds: tuple[str, ...]) -> None:
    donor, base = files_of(models / "donor"), files_of(models / "base")
    done = graft(models / "donor", models / "base", tmp_path / "new" / "out", kinds)  # type: ignore[arg-type]
    found = files_of(tmp_path / "new" / "out")
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        assert not torch.equal(donor[name], base[name])
        assert same(tensor, (donor if kind_of(name) in kinds else base)[name]), name
    taken = sum(kind_of(name) in kinds for name in base)
    assert done == Graft(taken, len(base) - taken)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "new" / "out" / file).read_bytes() == (models / "base" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["out"]
    AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "out")


def test_large_models_are_written_in_several_files(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_SHARD_BYTES", 4096)
    graft(models / "donor", models / "base", tmp_path / "out", ["router"])
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    donor, base = files_of(models / "donor"), files_of(models / "base")
    for name, tensor in files_of(tmp_path / "out").items():
        assert same(tensor, (donor if kind_of(name) == "router" else base)[name]), name


def test_tensors_keep_the_dtypes_of_their_files(pair: tuple[Path, Path], tmp_path: Path) -> None:
    donor, base = pair
    edit(donor, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    graft(donor, base, tmp_path / "out", ["router"])
    dtypes = {(kind_of(name) == "router", tensor.dtype) for name, tensor in files_of(tmp_path / "out").items()}
    assert dtypes == {(True, torch.bfloat16), (False, torch.float32)}
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_stray_output_layer_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    """Beside another embedding it would make the model unreadable."""
    for name, seed in (("donor", 0), ("base", 1)):
        make_tiny_model(tmp_path / name, num_layers=1, hidden_size=32, num_experts=4, tied=True, seed=seed)
    edit(tmp_path / "base", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    graft(tmp_path / "donor", tmp_path / "base", tmp_path / "out", ["embedding"])
    found = files_of(tmp_path / "out")
    assert "lm_head.weight" not in found
    assert same(found["model.embed_tokens.weight"], files_of(tmp_path / "donor")["model.embed_tokens.weight"])


# ---- what is refused -------------------------------------------------------------------------------------------


def refused(donor: Path, base: Path, out: Path, *kinds: str) -> str:
    """Returns the error; nothing is left behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(UserError) as caught:
        graft(donor, base, out, kinds or ("router",))  # type: ignore[arg-type]
    assert sorted(out.parent.rglob("*")) == before
    return str(caught.value)


def test_an_existing_directory_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(FileInTheWayError, match="out exists already; choose another directory"):
        graft(*pair, tmp_path / "out", ["router"])
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    assert "gone exists already" in refused(*pair, tmp_path / "gone")
    assert (tmp_path / "gone").is_symlink()


def test_another_architecture_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    donor, base = pair
    config = json.loads((donor / "config.json").read_text())
    (donor / "config.json").write_text(json.dumps({**config, "norm_topk_prob": not config["norm_topk_prob"]}))
    error = refused(donor, base, tmp_path / "out")
    assert f"{donor} is of another architecture than {base}: router.pre_softmax " in error


def test_a_kind_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "dense", **TINY["qwen3"])
    error = refused(model, model, tmp_path / "out", "attention", "router", "expert")
    assert error == f"{model} has no weights of kind router or expert; it has attention, embedding, other"


@pytest.mark.parametrize("damaged", ["donor", "base"])
def test_missing_misshapen_or_damaged_tensors_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, damaged: str
) -> None:
    """Also if the tensor is not one that the graft takes from this model."""
    at = tmp_path / damaged
    tensors = files_of(at)
    for file in at.glob("*.safetensors*"):
        file.unlink()

    def write(**changed: Tensor) -> str:
        from safetensors.torch import save_file

        save_file({n: t for n, t in {**tensors, **changed}.items() if t is not None}, at / "model.safetensors")
        return refused(*pair, tmp_path / "out")

    assert f"{GATE} missing" in write(**{GATE: None})  # type: ignore[arg-type]
    assert f"{GATE} has shape (1, 16)" in write(**{GATE: torch.zeros(1, 16)})
    assert f"{GATE} has dtype I8" in write(**{GATE: torch.zeros(tensors[GATE].shape, dtype=torch.int8)})
    assert "model.layers.0.extra has no place" in write(**{"model.layers.0.extra": torch.zeros(1)})
    kept = GATE if damaged == "donor" else "model.norm.weight"
    assert f"{kept} holds NaN" in write(**{kept: torch.full_like(tensors[kept], torch.nan)})


def test_a_full_disk_leaves_nothing_behind(models: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "20k") as disk:
        told = (
            r"the model in .*/disk/out was not written: .*no space left on device; .*Free some space, and start again"
        )
        with pytest.raises(DiskError, match=told):
            graft(models / "donor", models / "base", disk / "out", ["router"])
        assert not list(disk.iterdir())


# ---- the command line ------------------------------------------------------------------------------------------


def test_the_command_takes_several_kinds(models: Path, tmp_path: Path) -> None:
    words = ["graft", *map(str, (models / "donor", models / "base", tmp_path / "out"))]
    done = CliRunner().invoke(app, [*words, "--weights", "router", "--weights", "embedding", "--weights", "router"])
    assert done.exit_code == 0, done.output
    donor, base = files_of(models / "donor"), files_of(models / "base")
    for name, tensor in files_of(tmp_path / "out").items():
        assert same(tensor, (donor if kind_of(name) in ("router", "embedding") else base)[name]), name
    assert f"5 tensors of {models / 'donor'}, {len(base) - 5} of {models / 'base'}" in done.output.replace("\n", "")


def test_the_command_refuses_other_kinds(models: Path, tmp_path: Path) -> None:
    words = ["graft", *map(str, (models / "donor", models / "base", tmp_path / "out"))]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "--weights" in done.output
    done = CliRunner().invoke(app, [*words, "--weights", "router", "--weights", "routers"])
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("--weights: found routers, expected one of router, expert, attention")
    assert not (tmp_path / "out").exists()
