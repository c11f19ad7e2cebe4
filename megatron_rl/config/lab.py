"""What a run records, and what it watches for. Imports without torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import Frozen, Limits, PositiveInt


class WandbConfig(Frozen):
    project: str
    """Project of Weights & Biases. The key comes from `wandb login` or WANDB_API_KEY; with WANDB_MODE=offline the run
    stays in run_dir/wandb, and `wandb sync` sends it later."""
    entity: str | None = None
    """User or team that owns the project. Defaults to null: the account's own."""
    group: str | None = None
    """Runs of one group are shown together."""


class PrometheusConfig(Frozen):
    port: Annotated[int, Field(ge=1, le=65535)]
    """Port on which rank 0 answers Prometheus, at /metrics."""
    host: str = "127.0.0.1"
    """Address to listen on. Anyone who reaches it can read the metrics; no one can change anything there."""


class Alarm(Limits):
    """Gives early warning: fires at an optimizer step if a metric is beyond its limit, and was in the steps before. It
    has one limit, `above` or `below`."""

    metric: str
    """Name in metrics.jsonl, such as `ratio/p99`."""
    steps: PositiveInt = 1
    """Optimizer steps in a row."""
    action: Literal["warn", "skip", "stop"] = "warn"
    """warn: say so. skip: leave the weights as they are in this optimizer step; only metrics of the policy's update
    count, without those of the rollout. stop: save a checkpoint after the rollout step and end with status 75."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.above is None) == (self.below is None):
            raise PydanticCustomError("bound", "one bound: either `above` or `below`")
        return self


class LabConfig(Frozen):
    wandb: WandbConfig | None = None
    """Sends the metrics to Weights & Biases too; needs the extra [wandb]. Defaults to null: only run_dir has them."""
    prometheus: PrometheusConfig | None = None
    """Serves the newest metrics to Prometheus (docs/monitoring.md). Defaults to null: no port is opened."""
    alarms: tuple[Alarm, ...] = ()
    """Alarms, as a list of {metric, above or below, steps, action}. metrics.jsonl has each as `alarm/METRIC/ACTION`: 1
    if it fired."""


class RlLabConfig(LabConfig):
    record_steps: tuple[PositiveInt, ...] = ()
    """Rollout steps, from 1, of which run_dir/tokens gets the log-probs, entropy and expert change of each token, for
    `megatron-rl inspect`."""
