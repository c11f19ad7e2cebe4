"""Model families: the attributes that each file declares, and that only megatron_rl.models mentions a family."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from models_reference import dense_architecture, moe_architecture

import megatron_rl
from megatron_rl.models.registry import MODULES, find_family, server_caveats, weights_of

PACKAGE = Path(megatron_rl.__file__).parent
# A report that is the source of objectives, and SGLang's own files.
ALLOWED = re.compile(r"deepseek-v[0-9.]+|sglang\.srt\.models\.\w+")
OF_FAMILIES = {PACKAGE / "models", PACKAGE / "demo"}  # the demo makes a model
ELSEWHERE = [path for path in sorted(PACKAGE.rglob("*.py")) if not OF_FAMILIES & set(path.parents)]
# Megatron-Core's own model is called GPTModel.
PREFIXES = {re.match("gpt_oss|[a-z]+", model_type)[0] for model_type in MODULES} | {"gpt-oss"}  # type: ignore[index]


def mentions(source: str) -> Iterator[str]:
    """Yields names of families in the text, and expressions that ask for a model's family."""
    for number, line in enumerate(source.splitlines(), start=1):
        text = ALLOWED.sub("", line.lower())
        if any(prefix in text for prefix in PREFIXES):
            yield f"{number}: {line.strip()}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("family", "model_type"):
            yield f"{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.alias) and node.name in ("family_of", "find_family", "MODULES"):
            yield f"{node.lineno}: import of {node.name}"


def test_no_other_room_names_a_family() -> None:
    found = {str(path.relative_to(PACKAGE)): list(mentions(path.read_text(encoding="utf-8"))) for path in ELSEWHERE}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "# as Qwen3-MoE has it",
        "from megatron_rl.models import qwen3",
        "from megatron_rl.models.registry import family_of",
        "experts = arch.model_type == wanted",
        "weights = FAMILIES[arch.family]",
    ],
)
def test_the_check_finds_a_mention_of_a_family(source: str) -> None:
    assert list(mentions(source))


@pytest.mark.parametrize("model_type", MODULES)
def test_each_family_declares_its_required_attributes(model_type: str) -> None:
    family = find_family(model_type)
    own = family.MODEL_TYPE  # several model_types may be one family
    assert MODULES[own] == MODULES[model_type]
    assert getattr(transformers, family.CAUSAL_LM).config_class.model_type == own
    assert (
        re.sub("For(CausalLM|ConditionalGeneration)", "ForTokenClassification", family.CAUSAL_LM) == family.VALUE_MODEL
    )
    if hasattr(transformers, family.VALUE_MODEL):
        assert getattr(transformers, family.VALUE_MODEL).config_class.model_type == own
    assert all(isinstance(values, tuple) for values in family.INERT.values())
    assert all(re.compile(pattern) for pattern in family.UNUSED)
    assert all(callable(getattr(family, name)) for name in ("read", "weights", "server_caveats"))


def test_server_caveats_name_dense_layers() -> None:
    assert list(server_caveats(moe_architecture(dense_layers=()))) == []
    assert list(server_caveats(dense_architecture())) == []
    (caveat,) = server_caveats(moe_architecture(dense_layers=(1,)))
    assert caveat.startswith("layers [1] are dense, but SGLang")


def test_server_caveats_name_norms_that_the_servers_make_otherwise() -> None:
    found = dataclasses.replace(dense_architecture(), model_type="olmoe", qk_norm="all", rms_norm_eps=1e-5)
    served = dataclasses.replace(found, hidden_size=found.num_kv_heads * found.head_dim)
    assert list(server_caveats(served)) == []
    narrow, eps = server_caveats(dataclasses.replace(served, hidden_size=2 * served.hidden_size, rms_norm_eps=1e-6))
    assert "but SGLang's olmoe has a norm of hidden_size" in narrow
    assert eps == "rms_norm_eps is 1e-06, but SGLang's olmoe has 1e-05 in the norms on heads"


def test_a_model_without_qk_norm_has_no_qk_norm_weights() -> None:
    with_norms, without = (
        {weight.name for weight in weights_of(dense_architecture(num_layers=1, qk_norm=qk_norm))}
        for qk_norm in ("head", "none")
    )
    norms = {f"decoder.layers.0.self_attention.{head}_layernorm.weight" for head in "qk"}
    assert with_norms - without == norms
    assert without < with_norms
