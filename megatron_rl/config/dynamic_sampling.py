"""The configuration of dynamic sampling. No torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_rl.config.bounds import Frozen, NonNegativeInt


class DynamicSamplingConfig(Frozen):
    """DAPO's [2503.14476, section 3.2]: only groups with right and wrong answers are trained on. Groups of other
    prompts replace the rest."""

    oversample: Annotated[float, Field(ge=1, le=1000)] = 1.5
    """Prompts asked for each group that is missing."""
    max_refills: NonNegativeInt = 8
    """How often prompts are taken once more in a step before the run ends with an error."""
