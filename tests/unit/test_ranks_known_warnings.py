"""Known start-up warnings of other libraries are hidden, and no other warning is."""

from __future__ import annotations

import re
import sys
import warnings

import pytest

from megatron_rl.ranks.known_warnings import EVERYWHERE, ON_CPU, hide_known_warnings

FULL_SCOPE = "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer."
CONFIG_MODULE = "megatron.core.transformer.transformer_config"


def shown(text: str, module: str, category: type[Warning] = UserWarning) -> bool:
    """Whether a warning that `module` gives is shown while the known ones are hidden."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        hide_known_warnings(EVERYWHERE + ON_CPU)
        warnings.warn_explicit(text, category, "file.py", 1, module=module)
    return bool(caught)


def test_a_known_warning_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert not shown(FULL_SCOPE, CONFIG_MODULE)


@pytest.mark.parametrize(
    ("text", "module", "category"),
    [
        ("half scope is deprecated", CONFIG_MODULE, UserWarning),
        (FULL_SCOPE, "megatron_rl.engine.model", UserWarning),
        (FULL_SCOPE, CONFIG_MODULE, FutureWarning),
        ("Note: " + FULL_SCOPE, CONFIG_MODULE, UserWarning),
    ],
    ids=["other text", "our module", "other category", "text within"],
)
def test_any_other_warning_is_shown(
    monkeypatch: pytest.MonkeyPatch, text: str, module: str, category: type[Warning]
) -> None:
    monkeypatch.setattr(sys, "warnoptions", [])
    assert shown(text, module, category)


def test_known_warnings_are_shown_if_the_user_asks_for_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    assert shown(FULL_SCOPE, CONFIG_MODULE)


def test_no_known_warning_pattern_matches_this_package() -> None:
    assert not [known for known in EVERYWHERE + ON_CPU if re.match(known.module, "megatron_rl.engine.model")]
