"""A user's own objective: called instead of policy_loss, and refused with a reason if it is invalid."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch
from objective_reference import GRPO, denominators, pack, random_sequences

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.objectives.custom import ObjectiveError, get_objective
from megatron_rl.objectives.policy_loss import policy_loss

SEQUENCES = random_sequences(1, [3, 0, 4])


def doubled(inputs, config, sizes):
    outputs = policy_loss(inputs, config, sizes)
    return dataclasses.replace(outputs, loss=2 * outputs.loss)


def call(function_name):
    inputs = pack(SEQUENCES)
    config = GRPO.model_copy(update={"custom": f"{__name__}:{function_name}"})
    return inputs, get_objective(config)(inputs, config, denominators(SEQUENCES))


def test_policy_loss_is_used_without_a_custom_objective():
    assert get_objective(ObjectiveConfig()) is policy_loss


def test_a_custom_objective_gets_the_arguments_of_policy_loss():
    inputs, outputs = call("doubled")
    plain = policy_loss(inputs, GRPO, denominators(SEQUENCES))
    assert outputs.loss.item() == 2 * plain.loss.item()
    assert outputs.loss.requires_grad


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("grpo", "found 'grpo', expected package.module:function"),
        ("no_such_package.module:function", "cannot be imported: No module named 'no_such_package'"),
        (f"{__name__}:missing", "cannot be imported: module .* has no attribute 'missing'"),
        (f"{__name__}:SEQUENCES", "is of type list, expected a function"),
        (":doubled", "cannot be imported"),
    ],
)
def test_a_missing_custom_objective_is_refused(name, reason):
    with pytest.raises(ObjectiveError, match=rf"objective\.custom: .*{reason}"):
        get_objective(ObjectiveConfig(custom=name))


def without_denominators(inputs, config): ...


def with_more(inputs, config, sizes, temperature): ...


def with_a_default(inputs, config, sizes, temperature=1.0):
    return doubled(inputs, config, sizes)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("without_denominators", r"has the parameters \(inputs, config\), expected .*: too many positional arguments"),
        ("with_more", r"\(inputs, config, sizes, temperature\), expected .*missing a required argument: 'temperature'"),
    ],
)
def test_a_custom_objective_with_other_parameters_is_refused_before_it_is_called(name, reason):
    with pytest.raises(ObjectiveError, match=rf"objective\.custom: '.*:{name}' .*{reason}"):
        get_objective(ObjectiveConfig(custom=f"{__name__}:{name}"))
    assert call("with_a_default")[1].loss.requires_grad


@pytest.mark.parametrize(
    ("code", "said"),
    [("undefined", "NameError: name 'undefined'"), ("exit(3)", "SystemExit: 3"), ("def f(:", "SyntaxError: ")],
)
def test_a_module_that_fails_is_one_error(code, said, tmp_path, monkeypatch):
    module = f"objective_{len(code)}"
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ObjectiveError, match=f"'{module}:f' cannot be imported: {said}"):
        get_objective(ObjectiveConfig(custom=f"{module}:f"))


def failing(inputs, config, sizes):
    raise KeyError("clip")


def test_a_custom_objective_that_raises_is_one_error_with_its_place():
    line = inspect.getsourcelines(failing)[1] + 1
    said = rf"objective\.custom: '.*:failing' raised KeyError: 'clip' \({re.escape(__file__)}, line {line}\)$"
    with pytest.raises(ObjectiveError, match=said):
        call("failing")


def by_token(inputs, config, sizes):
    outputs = policy_loss(inputs, config, sizes)
    return dataclasses.replace(outputs, loss=outputs.loss * torch.ones(7))


def detached(inputs, config, sizes):
    outputs = policy_loss(inputs, config, sizes)
    return dataclasses.replace(outputs, loss=outputs.loss.detach())


def bare(inputs, config, sizes):
    return policy_loss(inputs, config, sizes).loss


def number(inputs, config, sizes):
    return dataclasses.replace(policy_loss(inputs, config, sizes), loss=1.0)  # type: ignore[arg-type]


def replaced(part, **changes):
    def objective(inputs, config, sizes):
        outputs = policy_loss(inputs, config, sizes)
        values = outputs.values
        if part is None:
            return dataclasses.replace(outputs, values=dataclasses.replace(values, **changes))
        changed = dataclasses.replace(getattr(values, part), **changes)
        return dataclasses.replace(outputs, values=dataclasses.replace(values, **{part: changed}))

    return objective


short_ratio = replaced(None, log_sequence_ratio=torch.zeros(2))
whole_mask = replaced("clipping", below=torch.zeros(20, dtype=torch.bool))
float_mask = replaced("clipping", above=torch.zeros(7))
short_factor = replaced("correction", factor=torch.ones(3))
whole_floored = replaced(None, floored=torch.zeros(20, dtype=torch.bool))
bool_factor = replaced("correction", factor=torch.ones(7, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("by_token", r"loss: shape \(7,\), expected \(\)"),
        ("detached", "loss has no gradient"),
        ("bare", "gave a Tensor, expected PolicyLossOutputs"),
        ("number", "loss: found a float, expected a tensor"),
        ("short_ratio", r"log_sequence_ratio: shape \(2,\), expected \(3,\)"),
        ("whole_mask", r"below: shape \(20,\), expected \(7,\)"),
        ("float_mask", "above: dtype torch.float32, expected bool"),
        ("short_factor", r"factor: shape \(3,\), expected \(7,\)"),
        ("whole_floored", r"floored: shape \(20,\), expected \(7,\)"),
        ("bool_factor", "factor: dtype torch.bool, expected float"),
    ],
)
def test_invalid_outputs_of_a_custom_objective_are_refused(name, reason):
    with pytest.raises(ObjectiveError, match=rf"objective\.custom: '.*:{name}'.*{reason}"):
        call(name)
