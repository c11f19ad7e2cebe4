"""A user's own objective, `objective.custom: package.module:function`, in place of the switches.

It is called as policy_loss is, with the inputs of one micro-batch, the objective and the mini-batch's denominators, and
gives what policy_loss gives. The switches mean what it makes of them, but for advantage, which comes before it, and for
a correction of kind mis, whose rejections are out of the denominators that it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.data.schedule import Denominators
from megatron_rl.errors import UserError
from megatron_rl.named_code import import_own, told
from megatron_rl.objectives.inputs import LossInputs, PolicyLossOutputs
from megatron_rl.objectives.policy_loss import policy_loss

Objective = Callable[[LossInputs, ObjectiveConfig, Denominators], PolicyLossOutputs]


class ObjectiveError(UserError):
    """An objective of the user's that cannot be imported, raises, or gives what no objective gives; names it."""


def get_objective(config: ObjectiveConfig) -> Objective:
    """policy_loss, or the user's own with its outputs checked. Raises ObjectiveError if there is none, or if it takes
    other arguments."""
    name = config.custom
    if name is None:
        return policy_loss
    if ":" not in name:
        raise ObjectiveError(f"objective.custom: found {name!r}, expected package.module:function")
    try:
        function = import_own(name)
    except LookupError as error:
        raise ObjectiveError(f"objective.custom: {name!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ObjectiveError(f"objective.custom: {name!r} is of type {type(function).__name__}, expected a function")
    _check_parameters(function, name)

    def checked(inputs: LossInputs, config: ObjectiveConfig, denominators: Denominators) -> PolicyLossOutputs:
        try:
            outputs = function(inputs, config, denominators)
        except UserError:
            raise
        except Exception as error:
            raise ObjectiveError(f"objective.custom: {name!r} raised {told(error)}") from error
        return _checked(outputs, inputs, f"objective.custom: {name!r}")

    return checked


def _check_parameters(function: Callable[..., object], name: str) -> None:
    """Raises ObjectiveError if the function cannot be called with three arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, which does not tell
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise ObjectiveError(
            f"objective.custom: {name!r} has the parameters {signature}, expected (inputs, config, denominators): "
            f"{error}"
        ) from None


def _checked(outputs: object, inputs: LossInputs, name: str) -> PolicyLossOutputs:
    if not isinstance(outputs, PolicyLossOutputs):
        raise ObjectiveError(f"{name} gave a {type(outputs).__name__}, expected PolicyLossOutputs")
    masked_in = (int(inputs.loss_mask.sum()),)
    _check_tensor(outputs.loss, (), False, f"{name}: loss")
    if not outputs.loss.requires_grad:
        raise ObjectiveError(f"{name}: loss has no gradient; it must depend on inputs.logprobs")
    values = outputs.values
    _check_tensor(values.log_sequence_ratio, (inputs.num_sequences,), False, f"{name}: log_sequence_ratio")
    if values.floored is not None:
        _check_tensor(values.floored, masked_in, True, f"{name}: floored")
    for part in (values.clipping, values.correction):
        for field in fields(part):
            value = getattr(part, field.name)
            if value is not None:
                _check_tensor(value, masked_in, field.name != "factor", f"{name}: {field.name}")
    return outputs


def _check_tensor(value: object, shape: tuple[int, ...], is_bool: bool, name: str) -> None:
    kind = "bool" if is_bool else "float"
    if not isinstance(value, Tensor):
        raise ObjectiveError(f"{name}: found a {type(value).__name__}, expected a tensor")
    if tuple(value.shape) != shape:
        raise ObjectiveError(f"{name}: shape {tuple(value.shape)}, expected {shape}")
    if (value.dtype == torch.bool) != is_bool or not (is_bool or value.is_floating_point()):
        raise ObjectiveError(f"{name}: dtype {value.dtype}, expected {kind}")
