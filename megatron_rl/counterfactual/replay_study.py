"""`megatron-rl replay-study`: one saved rollout batch under many routings and objectives, at the same weights.

Nothing is trained, except that `--updates` optimizer steps may make the later weights. pi_old are the weights of
model.path. pi_theta are the later weights, the same for every routing, objective and mini-batch. So two routings differ
by what they do at these weights, and not by where a run with each of them would have gone.

The noise floor is a second pass of pi_old in smaller micro-batches: differences that rounding alone makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_rl.config.fp8_products import refuse_fp8
from megatron_rl.config.load import ConfigError
from megatron_rl.config.schema import Config
from megatron_rl.config.switches import NoKL
from megatron_rl.counterfactual.gradients import Vectors, gram
from megatron_rl.counterfactual.objectives_compared import (
    ObjectiveArm,
    TokenColumns,
    all_objectives,
    load_objective,
    sample_advantages,
)
from megatron_rl.counterfactual.routings import ROUTINGS, load_routers, unavailable
from megatron_rl.counterfactual.saved_batch import (
    SavedBatch,
    gather_heads,
    gather_tokens,
    load_batch,
    pack_batch,
    write_lines,
)
from megatron_rl.counterfactual.study_lines import (
    Line,
    cosine_lines,
    gradient_lines,
    objective_lines,
    print_study,
    ratio_lines,
)
from megatron_rl.counterfactual.study_passes import (
    Columns,
    OldPass,
    Packing,
    Passes,
    gradient,
    new_pass,
    old_pass,
    reference_logprobs,
    token_columns,
)
from megatron_rl.engine.policy import Policy
from megatron_rl.errors import UserError
from megatron_rl.loop.experience import measure_router_shift, prepare
from megatron_rl.loop.trainer import Trainer, open_trainer
from megatron_rl.models.architecture import differences, read_architecture
from megatron_rl.models.check import check_model

__all__ = ["ROUTINGS", "StudyOptions", "all_objectives", "check_options", "print_study", "replay_study"]

RERUN = "rerun"
"""Name of the noise floor among the routings."""
OUTPUT = "replay_study.jsonl"


@dataclass(frozen=True)
class StudyOptions:
    step: int
    routings: tuple[str, ...]
    objectives: tuple[str, ...]
    gradients: bool = True
    later: Path | None = None
    """Model directory of pi_theta."""
    updates: int = 0
    """Optimizer steps that make pi_theta from pi_old, with the configuration's own objective and routing."""
    older: Path | None = None
    graft: Path | None = None
    agree: int | None = None
    """Experts of a row that must agree under r3-agreeing. Defaults to None: all but one."""


def check_options(config: Config, options: StudyOptions) -> None:
    """Checks what this rank needs for the study. Raises UserError."""
    if config.rollout.replay_from is None:
        raise ConfigError("rollout.replay_from: not set; name the run directory whose saved rollouts are studied")
    refuse_fp8(config.engine)
    for name in options.routings:
        if name not in ROUTINGS:
            raise ConfigError(f"--routing: found {name!r}; expected one of {', '.join(ROUTINGS)}")
    if options.later is not None and options.updates:
        raise ConfigError("--later and --updates both say what pi_theta is; give one of them")
    if options.updates > config.train.mini_batches:
        raise ConfigError(
            f"--updates: {options.updates}, but a step has train.mini_batches = {config.train.mini_batches} updates"
        )
    arch = read_architecture(config.model.path)
    if options.agree is not None and options.agree > arch.experts_per_token:
        raise ConfigError(f"--agree: {options.agree}, but a token has {arch.experts_per_token} experts")
    for option, directory in (("later", options.later), ("older", options.older), ("graft", options.graft)):
        if directory is None:
            continue
        try:
            check_model(directory)
        except UserError as error:
            raise ConfigError(f"--{option}: {error}") from None
        if differing := differences(read_architecture(directory), arch):
            raise ConfigError(
                f"--{option}: {directory} is of another architecture than model.path: {'; '.join(differing)}"
            )
    for name in options.objectives:
        load_objective(name, config)


def replay_study(config: Config, options: StudyOptions) -> list[Line]:
    """Runs the study, writes its lines to run_dir/replay_study.jsonl and returns them; [] on ranks other than 0.

    Collective. Raises UserError, on every rank, if the rollouts or the models do not fit the configuration.
    """
    with open_trainer(config, steps=1, resume=False, temperature=config.rollout.temperature) as trainer:
        with trainer.console.starting("data", f"step {options.step} of {config.rollout.replay_from}"):
            objectives = [load_objective(name, config) for name in options.objectives]
            centred = any(arm.objective.centering is not None for arm in objectives)
            batch = load_batch(config, trainer, options.step, with_top=centred)
        study = _Study(config, options, trainer, batch, objectives)
        trainer.begin()
        lines = study.run()
        write_lines(trainer, "the study", OUTPUT, lines)
    return lines


class _Study:
    """One study on this rank. Its methods are collective."""

    def __init__(
        self,
        config: Config,
        options: StudyOptions,
        trainer: Trainer,
        batch: SavedBatch,
        asked: Sequence[ObjectiveArm],
    ) -> None:
        self.config = config
        self.options = options
        self.trainer = trainer
        self.batch = batch
        reasons = {arm.name: arm.unavailable(batch.top_k) for arm in asked}
        self.objectives = [arm for arm in asked if not reasons[arm.name]]
        if asked and not self.objectives:
            raise ConfigError("--objective: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        self.base = config.routing.replay
        """The configuration's own routing, under which objectives are compared; routings are compared under the first
        objective."""
        if reason := self._missing(self.base):
            raise ConfigError(f"routing.replay: {self.base}, but {reason}")
        self.missing = {name: reason for name in options.routings if (reason := self._missing(name))}
        self.missing |= {name: reason for name, reason in reasons.items() if reason}
        wanted = {*options.routings, self.base, "none"} - set(self.missing)
        self.routings = [name for name in ROUTINGS if name in wanted]
        agree = options.agree or max(trainer.policy.arch.experts_per_token - 1, 1)
        shifts = any(arm.objective.router_shift is not None for arm in self.objectives)
        self.packing = Packing(batch.mini_batches, agree, shifts, batch.top_k)
        smaller = max(config.engine.max_tokens_per_micro_batch // 2, 1)
        again = pack_batch(config, trainer, batch.groups, smaller, batch.without_traces == 0, batch.top_k)
        self.other_packing = Packing(again, agree, shifts, batch.top_k)
        self.advantages = {arm.name: sample_advantages(batch.groups, arm, trainer.place) for arm in self.objectives}

    def _missing(self, name: str) -> str:
        return unavailable(
            name,
            experts=self.trainer.policy.arch.num_experts,
            without_traces=self.batch.without_traces,
            older=self.options.older is not None,
            graft=self.options.graft is not None,
        )

    def run(self) -> list[Line]:
        """Returns the lines of the study on rank 0, and [] on the others."""
        trainer = self.trainer
        references = self._references()
        with trainer.journal.phase("pi_old"):
            olds = {name: old_pass(trainer.policy, self.packing, ROUTINGS[name]) for name in self.routings}
            rerun = old_pass(trainer.policy, self.other_packing, ROUTINGS[self.base])
            older = self._older()
        theta = self._later()
        columns: dict[str, list[TokenColumns]] = {}
        gradients: dict[tuple[str, str], Vectors] = {}
        for name in self.routings:
            arm, old = ROUTINGS[name], olds.pop(name)
            owners = {"pi_old": self.config.model.path, "graft": self.options.graft}
            if (owner := owners.get(arm.routers)) is not None:
                load_routers(theta, owner)
            with trainer.journal.phase("pi_theta"):
                new = new_pass(theta, self.packing, arm, old, older)
                columns[name] = token_columns(theta, self.packing, old, new, references[0])
            for objective in self._compared(name):
                with trainer.journal.phase("gradients"):
                    passes = Passes(arm, old, new, older, references[0])
                    gradients[name, objective.name] = self._gradient(theta, self.packing, objective, passes)
            if owner is not None:
                load_routers(theta, theta.model_dir)
        columns[RERUN] = self._rerun_columns(columns[self.base], rerun)
        for objective in self._compared(RERUN):
            new = new_pass(theta, self.other_packing, ROUTINGS[self.base], rerun, older)
            passes = Passes(ROUTINGS[self.base], rerun, new, older, references[1])
            gradients[RERUN, objective.name] = self._gradient(theta, self.other_packing, objective, passes)
        products = gram(list(gradients.values()), theta) if gradients else {}
        if trainer.place.rank != 0:
            return []
        return [
            self._header(columns["none"]),
            *ratio_lines(columns),
            *objective_lines(columns, self.objectives, self.advantages),
            *gradient_lines(list(gradients), products),
            *cosine_lines(list(gradients), products),
        ]

    def _compared(self, routing: str) -> Sequence[ObjectiveArm]:
        """The objectives whose gradients are computed under a routing."""
        if not self.options.gradients:
            return []
        return self.objectives if routing == self.base else self.objectives[:1]

    def _gradient(self, theta: Policy, packing: Packing, objective: ObjectiveArm, passes: Passes) -> Vectors:
        return gradient(theta, packing, objective, self.advantages[objective.name], passes)

    def _references(self) -> tuple[Columns | None, Columns | None]:
        """pi_ref's log-probs in both packings; None if no objective has a KL."""
        if all(isinstance(arm.objective.kl, NoKL) for arm in self.objectives):
            return None, None
        reference = self.trainer.reference or self._load(self.config.model.reference or self.config.model.path)
        return reference_logprobs(reference, self.packing), reference_logprobs(reference, self.other_packing)

    def _older(self) -> OldPass | None:
        if self.options.older is None or not any(ROUTINGS[name].new == "older" for name in self.routings):
            return None
        plain = dataclasses.replace(self.packing, shifts=False)
        return old_pass(self._load(self.options.older), plain, ROUTINGS["none"])

    def _load(self, model_dir: Path, *, frozen: bool = True) -> Policy:
        policy, temperature = self.trainer.policy, self.config.rollout.temperature
        return Policy(
            model_dir, policy.layout, policy.place, policy.engine, policy.device, None, temperature, frozen=frozen
        )

    def _later(self) -> Policy:
        """pi_theta. Without an optimizer its gradients are reduced whole into each parameter's main_grad."""
        trainer = self.trainer
        directory = self.options.later or self.config.model.path
        if self.options.updates:
            with trainer.journal.phase("updates"):
                version = self.options.step - 1
                updates = prepare(
                    self.config, trainer, self.batch.mini_batches, weight_version=version, measures_noise=False
                )
                for update in updates[: self.options.updates]:
                    measure_router_shift(trainer, update)
                    routing = update.routing.update_pass() if update.routing else None
                    trainer.policy.update(update.mini_batch.micro_batches, update.loss, routing)
            directory = trainer.run.path / "later"
            trainer.export(trainer.policy, directory)
        return self._load(directory, frozen=False)

    def _rerun_columns(self, base: Sequence[TokenColumns], rerun: OldPass) -> list[TokenColumns]:
        """pi_old's second pass in place of pi_theta's: no weight differs, and no router has moved."""
        minis, place, top_k = self.other_packing.mini_batches, self.trainer.place, self.packing.top_k
        again = gather_tokens(minis, rerun.logprobs, place)
        tops = gather_heads(minis, rerun.top, place, top_k) if top_k else [None] * len(minis)
        return [
            dataclasses.replace(
                columns,
                new=new,
                top=top,
                shift=columns.shift and {index: np.ones(len(values)) for index, values in new.items()},
            )
            for columns, new, top in zip(base, again, tops, strict=True)
        ]

    def _header(self, columns: Sequence[TokenColumns]) -> Line:
        options, policy = self.options, self.trainer.policy
        lengths = [len(values) for each in columns for values in each.new.values()]
        models = {"later": options.later, "older": options.older, "graft": options.graft}
        return {
            "kind": "study",
            "rollouts": str(self.config.rollout.replay_from),
            "step": options.step,
            "model": str(self.config.model.path),
            **{key: str(path) for key, path in models.items() if path is not None},
            "updates": options.updates,
            "mini_batches": len(columns),
            "responses": sum(length > 0 for length in lengths),
            "tokens": sum(lengths),
            "routing": self.base,
            "objective": self.objectives[0].name if self.objectives else None,
            "agree": self.packing.agree if policy.arch.num_experts else None,
            "dtype": policy.engine.dtype,
            "ranks": policy.layout.world_size,
            "unavailable": self.missing,
        }
