"""How far log-probs and gradients are from a reference in fp32, and how far they may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LARGEST = (2e-5, 1e-4)
"""Largest |log-prob difference| and largest relative gradient difference that pass in fp32."""
OF_TRANSFORMERS = 1.5
"""How much larger the errors in bf16 may be than those of transformers in bf16."""
OF_TENSOR = 0.7
"""Relative error of one tensor's gradient that may pass in bf16: it is 1 if the gradient is missing."""


@dataclass(frozen=True)
class Errors:
    """Differences from the reference; inf stands for what is not finite, None for gradients of a server."""

    logprob_max: float
    logprob_rms: float
    grad_max: float | None = None
    """Relative to the largest value of the tensor."""
    grad_rms: float | None = None
    """Of all tensors together, relative to the reference's."""
    grad_tensor_rms: float | None = None
    """Of the tensor in which it is largest, relative to the reference's."""
    worst_gradient: str = ""
    """Name of the tensor with grad_max."""
    worst_tensor: str = ""
    """Name of the tensor with grad_tensor_rms."""


@dataclass(frozen=True)
class Bounds:
    """The largest differences (fp32) or root mean squares (bf16) that pass."""

    logprob: float
    grad: float
    grad_tensor: float | None = None
    """In bf16."""

    @classmethod
    def of(cls, transformers: Errors | None) -> Bounds:
        """`transformers`: its errors in bf16; None for fp32."""
        if transformers is None:
            return cls(*LARGEST)
        assert transformers.grad_rms is not None
        assert transformers.grad_tensor_rms is not None
        return cls(
            OF_TRANSFORMERS * transformers.logprob_rms,
            OF_TRANSFORMERS * transformers.grad_rms,
            max(OF_TENSOR, OF_TRANSFORMERS * transformers.grad_tensor_rms),
        )

    @property
    def of_largest(self) -> bool:
        return self.grad_tensor is None

    def measured(self, errors: Errors) -> tuple[float, float | None, str]:
        """Returns what `logprob` and `grad` bound, and the name of the worst gradient."""
        if self.of_largest:
            return errors.logprob_max, errors.grad_max, errors.worst_gradient
        return errors.logprob_rms, errors.grad_rms, errors.worst_tensor

    def allow(self, errors: Errors) -> bool:
        logprob, grad, _ = self.measured(errors)
        if logprob > self.logprob or (grad is not None and grad > self.grad):
            return False
        return self.grad_tensor is None or errors.grad_tensor_rms is None or errors.grad_tensor_rms <= self.grad_tensor


class GradientErrors:
    """Collects the errors of gradients, tensor by tensor, each relative to what is expected."""

    def __init__(self) -> None:
        self._max = self._tensor_rms = (0.0, "")
        self._squares = self._expected = 0.0

    def add(self, name: str, found: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> None:
        difference = np.abs((found - expected).astype(np.float64))
        squares, of_expected = float(np.square(difference).sum()), float(np.square(expected.astype(np.float64)).sum())
        # 1: zeros are expected.
        largest = finite(float(difference.max()) / (float(np.abs(expected).max()) or 1.0))
        self._max = max(self._max, (largest, name))
        self._tensor_rms = max(self._tensor_rms, (finite(math.sqrt(squares / (of_expected or 1.0))), name))
        self._squares += squares
        self._expected += of_expected

    def errors(self, logprob_max: float, logprob_rms: float) -> Errors:
        whole = finite(math.sqrt(self._squares / (self._expected or 1.0)))
        (largest, worst), (tensor_rms, worst_tensor) = self._max, self._tensor_rms
        return Errors(logprob_max, logprob_rms, largest, whole, tensor_rms, worst, worst_tensor)


def finite(value: float) -> float:
    """Returns inf for NaN, which is in no order with a bound."""
    return math.inf if math.isnan(value) else value


def largest_and_rms(difference: npt.NDArray[np.floating]) -> tuple[float, float]:
    """Returns the largest size and the root mean square; inf each if there is a NaN, 0 if there is nothing."""
    if not len(difference):
        return 0.0, 0.0
    return finite(float(np.abs(difference).max())), finite(float(np.sqrt(np.square(difference).mean())))
