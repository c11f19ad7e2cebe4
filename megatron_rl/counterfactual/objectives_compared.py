"""The objectives that a study compares: the configuration's own and presets, on the same tokens and rewards."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.config.sources import PRESETS
from megatron_rl.config.switches import NoKL, ObjectiveConfig
from megatron_rl.config.yaml12 import write_yaml
from megatron_rl.counterfactual.ratio_figures import Doubles
from megatron_rl.counterfactual.saved_batch import shaped
from megatron_rl.data.sample import Group
from megatron_rl.data.schedule import Denominators
from megatron_rl.engine.distribute import MiniBatch
from megatron_rl.engine.packed_advantages import needs_forward_pass, responses
from megatron_rl.lab.metrics import TRAINING, training_metrics
from megatron_rl.lab.sketch import MetricAccumulator
from megatron_rl.objectives.corrections import kept_lengths, leaves_denominators
from megatron_rl.objectives.custom import get_objective
from megatron_rl.objectives.inputs import LossInputs
from megatron_rl.ranks.collectives import all_gather_bytes
from megatron_rl.ranks.place import Place
from megatron_rl.train import with_advantages

OWN = "own"
"""Name of the configuration's own objective."""


@dataclass(frozen=True)
class ObjectiveArm:
    name: str
    config: Config
    """The study's configuration with this objective, and its rewards of right and wrong answers."""

    @property
    def objective(self) -> ObjectiveConfig:
        return self.config.objective

    def unavailable(self, top_k: int) -> str:
        """Why the objective cannot be evaluated without training, on a batch with `top_k` top tokens; "" if it can."""
        if self.objective.centering is not None and not top_k:
            return "score centering needs mu's most likely tokens, which responses of this batch lack"
        if not needs_forward_pass(self.objective):
            return ""
        return "its advantages come from a critic or from a KL in the reward, which a saved batch does not have"


def all_objectives() -> tuple[str, ...]:
    """Names of the configuration's own objective and of the built-in presets."""
    return OWN, *sorted(file.stem for file in PRESETS.glob("*.yaml"))


def load_objective(name: str, config: Config) -> ObjectiveArm:
    """The objective `own`, of a built-in preset, or of a YAML file with an objective (and presets of its own).

    All else is the study's: of `reward` only the preset's `correct` and `wrong` count. Raises ConfigError.
    """
    if name == OWN:
        return ObjectiveArm(name, config)
    tree = config.model_dump(mode="json", exclude={"objective", "merged_presets", "presets"})
    tree["reward"] = {key: value for key, value in tree["reward"].items() if key not in ("correct", "wrong")}
    tree["presets"] = [str(Path(name).absolute()) if name.endswith((".yaml", ".yml")) else name]
    with tempfile.TemporaryDirectory(prefix="megatron-rl-objective-") as scratch:
        path = Path(scratch) / f"{Path(name).stem}.yaml"
        path.write_text(write_yaml(tree))
        found = load_config(Config, path)
    reward = config.reward.model_copy(update={"correct": found.reward.correct, "wrong": found.reward.wrong})
    return ObjectiveArm(Path(name).stem, config.model_copy(update={"objective": found.objective, "reward": reward}))


def sample_advantages(groups: Sequence[Group], arm: ObjectiveArm, place: Place) -> dict[int, float]:
    """Returns the advantage of every sample of all leaders, by its number. Collective."""
    mine = {str(s.index): s.advantage for s in with_advantages(shaped(groups, arm.config), arm.config)}
    parts = all_gather_bytes(orjson.dumps(mine), place.control)
    return {int(index): value for part in parts for index, value in orjson.loads(part).items()}


def with_sample_advantages(mini_batch: MiniBatch, advantages: Mapping[int, float]) -> MiniBatch:
    """Returns the mini-batch with other advantages."""
    replaced = []
    for packed, outcomes in zip(mini_batch.micro_batches, mini_batch.outcomes, strict=True):
        values = np.zeros(packed.tokens, dtype=np.float32)
        for outcome, at in responses(packed, outcomes):
            values[at] = advantages[outcome.index]
        replaced.append(dataclasses.replace(packed, advantages=values))
    return dataclasses.replace(mini_batch, micro_batches=tuple(replaced))


@dataclass(frozen=True, eq=False)
class TokenColumns:
    """What one routing made of one mini-batch: values of each response's tokens, [|y|] float64, by sample number. Those
    of top tokens are [|y|, k]."""

    new: Mapping[int, Doubles]
    old: Mapping[int, Doubles]
    mu: Mapping[int, Doubles]
    entropy: Mapping[int, Doubles]
    reference: Mapping[int, Doubles] | None = None
    shift: Mapping[int, Doubles] | None = None
    top: Mapping[int, Doubles] | None = None
    top_mu: Mapping[int, Doubles] | None = None


def objective_figures(
    arm: ObjectiveArm, mini_batches: Sequence[TokenColumns], advantages: Mapping[int, float]
) -> dict[str, float]:
    """Returns a run's metrics of optimizer steps (lab/metrics.py), pooled over the mini-batches; `loss` is a sum."""
    metrics = MetricAccumulator(TRAINING)
    loss = get_objective(arm.objective)
    for columns in mini_batches:
        inputs = _inputs(arm.config, columns, advantages)
        if inputs is None:
            continue
        lengths = inputs.sequence_ids.bincount()
        if leaves_denominators(arm.objective):
            lengths = kept_lengths(inputs, arm.objective)
        by_prompt: Counter[int] = Counter()
        for prompt, tokens in zip(inputs.prompts or (), lengths.tolist(), strict=True):
            by_prompt[prompt] += tokens
        denominators = Denominators(int(lengths.sum()), int((lengths > 0).sum()), by_prompt)
        outputs = loss(inputs, arm.objective, denominators)
        training_metrics(metrics, inputs, outputs, _column(columns.entropy, list(columns.new)))
    return metrics.finalize()


def _inputs(config: Config, columns: TokenColumns, advantages: Mapping[int, float]) -> LossInputs | None:
    """One mini-batch as one packed row of responses; None if all its tokens are masked out."""
    objective = config.objective
    present = [index for index, values in columns.new.items() if len(values)]
    if not present:
        return None
    sizes = torch.tensor([len(columns.new[index]) for index in present])
    new, old, mu = (_column(each, present) for each in (columns.new, columns.old, columns.mu))
    reference = shift = None
    if not isinstance(objective.kl, NoKL) and columns.reference is not None:
        reference = _column(columns.reference, present)
    if objective.router_shift is not None and columns.shift is not None:
        shift = _column(columns.shift, present)
    top = top_mu = None
    if objective.centering is not None and columns.top is not None and columns.top_mu is not None:
        top, top_mu = (
            torch.from_numpy(np.concatenate([each[i] for i in present])) for each in (columns.top, columns.top_mu)
        )
    return LossInputs(
        logprobs=new,
        old_logprobs=old,
        rollout_logprobs=mu,
        advantages=torch.tensor([advantages[index] for index in present], dtype=torch.float64).repeat_interleave(sizes),
        loss_mask=torch.ones_like(new, dtype=torch.bool),
        sequence_ids=torch.arange(len(present)).repeat_interleave(sizes),
        num_sequences=len(present),
        reference_logprobs=reference,
        router_shift=shift,
        top_logprobs=top,
        top_rollout_logprobs=top_mu,
        prompts=[index // config.rollout.group_size for index in present],  # as train.with_advantages numbers samples
    )


def _column(values: Mapping[int, Doubles], order: Sequence[int]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0), *(values[index] for index in order)]))
