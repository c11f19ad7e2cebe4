"""The base class of every section, and the bounded values that several sections hold. Imports without torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from megatron_rl.disk import expected_of

# Upper bounds are far above what anyone needs, and below what overflows or runs for ever: a value beyond them is a
# slip of the keyboard, which should not cost a night.
LARGEST_INT = 2**31 - 1
MOST_RANKS = 2**17
"""Of one run; the planner lists all its layouts."""
MOST_GPUS_OF_A_NODE = 1024
Positive = Annotated[float, Field(gt=0, le=1e6)]
PositiveInt = Annotated[int, Field(ge=1, le=LARGEST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=LARGEST_INT)]
LearningRate = Annotated[float, Field(gt=0, le=100)]
AdamBeta = Annotated[float, Field(ge=0, lt=1)]
Reward = Annotated[float, Field(ge=-1e6, le=1e6)]
Seconds = Annotated[float, Field(gt=0, le=30 * 24 * 3600)]
MebiBytes = Annotated[int, Field(ge=1, le=2**20)]


def _check_path(path: Path) -> Path:
    if expected := expected_of(path):
        raise PydanticCustomError("path", "{expected}", {"expected": expected})
    return path


FilePath = Annotated[Path, AfterValidator(_check_path)]


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Limits(Frozen):
    above: float | None = None
    """Upper limit; a value above it is beyond. A value that is not finite is beyond any limit."""
    below: float | None = None
    """Lower limit; a value below it is beyond."""

    def are_passed_by(self, value: float | None) -> bool:
        """Returns whether the value is beyond. None is a value that is not finite."""
        if value is None or not math.isfinite(value):
            return True
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)
