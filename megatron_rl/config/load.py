"""A configuration from presets, one YAML file and dotted overrides, and what its keys say together. No torch.

Later wins: presets (and theirs), then the file, then the overrides. Paths are relative to the current directory, as for
any command; only a preset given as a file is relative to the file that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_rl.config.fp8_products import check_replay, fp8_multiple
from megatron_rl.config.freeze import check_freeze
from megatron_rl.config.group_choice import check_choice
from megatron_rl.config.idle import idle_keys
from megatron_rl.config.layout import Layout, LayoutError, check_layout
from megatron_rl.config.objective import check_objective
from megatron_rl.config.optim import check_optim
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.config.sections import Kinds, all_keys, sections, sections_of_kinds
from megatron_rl.config.server_flags import TRAINERS_FLAGS, UNROUTED_FLAGS, check_server_flags, flags_among
from megatron_rl.config.servers import CPU_ADVICE, cache_tokens, cpu_problem, exposed, read_urls
from megatron_rl.config.sharing import check_sharing
from megatron_rl.config.sources import ConfigError, Tree, nearest, read_sources, shown
from megatron_rl.config.stress import check_stress
from megatron_rl.config.switches import GroupAdvantage
from megatron_rl.config.yaml12 import write_yaml
from megatron_rl.data.generated import holds_out_nothing
from megatron_rl.models.architecture import Architecture, differences, read_architecture
from megatron_rl.models.registry import server_caveats

C = TypeVar("C", Config, SftConfig)

MAX_PROBLEMS = 50
"""Mistakes that one error lists: more come from a file that is no configuration."""
LENGTH_KEYS = "data.max_prompt_tokens + rollout.max_response_tokens"


def load_config(cls: type[C], path: Path, overrides: Sequence[str] = (), notes: list[str] | None = None) -> C:
    """The configuration with its presets merged in: `merged_presets` names them, `presets` is empty.

    Keys of presets that do nothing under the file and the overrides are taken out. Appends to `notes` one line for each
    of them, and for each section that another kind replaces. Raises ConfigError with all mistakes.
    """
    problems: list[str] = []
    kinds = sections_of_kinds(cls)
    tree = read_sources(path, overrides, kinds, problems)
    config = _validate(cls, tree, path, kinds, problems)
    while idle := [each for each in idle_keys(config) if tree.is_lent(each.key, each.cause)]:
        for each in idle:
            cause = tree.origin(each.cause) or ""
            tree.notes.append(f"{each}; dropped from {tree.origin(each.key)}, because of {cause}")
            tree.drop(each.key)
            tree.places[each.key] = cause  # which may make other keys idle
        config = _validate(cls, tree, path, kinds, problems)
    if notes is not None:
        notes += tree.notes
    return config


def _validate(cls: type[C], tree: Tree, path: Path, kinds: Mapping[str, Kinds], problems: list[str]) -> C:
    """Raises ConfigError with the problems, and with all that the tree's values add to them."""
    _complete(cls, tree, kinds)
    try:
        # JSON's strict mode is what a file of plain values needs: "8" and true are no integers, 1 is a number, text is
        # a path and a list a tuple.
        config = cls.model_validate_json(json.dumps(tree.values), strict=True)
    except ValidationError as error:
        known = sorted(all_keys(cls))
        problems += [_explain(mistake, tree, path, kinds, known) for mistake in error.errors()[: MAX_PROBLEMS + 1]]
    raise_all(problems)
    return config


def raise_all(problems: Sequence[str]) -> None:
    """Raises ConfigError with one line per problem, if there are any."""
    if len(problems) > MAX_PROBLEMS:
        problems = [*problems[:MAX_PROBLEMS], f"and more than {MAX_PROBLEMS} mistakes in all; fix these first"]
    if problems:
        raise ConfigError("\n".join(problems))


def dump_config(config: Config | SftConfig) -> str:
    """YAML that loads back to the same configuration."""
    return write_yaml(config.model_dump(mode="json"))


def _complete(cls: type[C], tree: Tree, kinds: Mapping[str, Kinds]) -> None:
    """Adds empty sections, so that what is missing in them is named by its own key, and the default kinds."""
    for name, _ in sections(cls):
        tree.values.setdefault(name, {})
    for section, its in kinds.items():
        values = tree.get(section)
        if isinstance(values, dict):
            values.setdefault(its.name, its.default)


# ---- mistakes --------------------------------------------------------------------------------------------------


def _explain(mistake: Any, tree: Tree, path: Path, kinds: Mapping[str, Kinds], known: Sequence[str]) -> str:
    """One line for one of pydantic's errors."""
    key, section = _dotted(mistake["loc"], kinds)
    kind, found = mistake["type"], mistake["input"]
    if kind == "union_tag_invalid":
        return _explain_kind(key, kinds[key], tree, path)
    its = kinds.get(section)
    now = tree.get(f"{section}.{its.name}") if its else ""
    under = f" under {section}.{its.name} {now}" if its else ""
    if kind == "missing":
        if its:
            where = tree.place(f"{section}.{its.name}") or path
            return f"{where}: {key}: not set, needed by {section}.{its.name} {now}"
        return f"{path}: {key}: not set, and it has no default"
    where = f"{tree.place(key) or path}: {key}"
    if kind == "extra_forbidden":
        return f"{where}: {_explain_unknown(key, found, section, its, now, known)}"
    bound = "a value " if kind.startswith(("greater", "less")) else ""
    expected = {
        "string_type": "text; put it in quotes" if isinstance(found, int | float) else "text",
        "tuple_type": "a list",
        "model_type": "a section of keys",
        "dict_type": "a section of keys",
    }.get(kind, bound + mistake["msg"].removeprefix("Input should be "))
    if kind.startswith("hidden"):  # it may be a secret in the wrong place
        return f"{where}: expected {expected}"
    return f"{where}: found {shown(found)}, expected {expected}{under if kind == 'literal_error' else ''}"


def _dotted(location: Sequence[str | int], kinds: Mapping[str, Kinds]) -> tuple[str, str]:
    """The key, without the kinds that pydantic puts after their sections, and the last of these sections or ""."""
    parts: list[str] = []
    section = ""
    for part in map(str, location):
        around = ".".join(parts)
        if around in kinds and around != section:
            section = around
        else:
            parts.append(part)
    return ".".join(parts), section


def _explain_kind(section: str, its: Kinds, tree: Tree, path: Path) -> str:
    key = f"{section}.{its.name}"
    found = tree.get(key)
    close = difflib.get_close_matches(found, its.members, n=1) if isinstance(found, str) else []
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{tree.place(key) or path}: {key}: found {shown(found)}, expected one of {', '.join(its.members)}{hint}"


def _explain_unknown(key: str, found: object, section: str, its: Kinds | None, now: str, known: Sequence[str]) -> str:
    """What is wrong with a key that its section, or the kind `now` of it, does not have."""
    if its is None:
        return f"no such key{nearest(key, known)}"
    if owners := its.having(key.rpartition(".")[2]):
        belongs = f"belongs to {section}.{its.name} {' or '.join(owners)}, but that is {now}"
        return f"found {shown(found)}; the key {belongs}. Drop the key, or change the {its.name}"
    own = [f"{section}.{each}" for each in its.members[now].model_fields]
    return f"no such key{nearest(key, own) or nearest(key, known)}"


# ---- contradictions --------------------------------------------------------------------------------------------


def check_config(config: Config | SftConfig, arch: Architecture, world_size: int) -> Layout:
    """The layout; raises ConfigError with all contradictions between keys, the model and the world."""
    try:
        layout = Layout.resolve(config.parallel, world_size)
        layout = dataclasses.replace(layout, token_multiple=fp8_multiple(config.engine))
    except LayoutError as error:
        raise ConfigError(str(error)) from None
    problems = [*check_layout(layout, arch, config.engine), *(idle.mistake for idle in idle_keys(config))]
    problems += [*check_optim(config.optim, "optim", config.engine), *check_freeze(config.optim, "optim", arch)]
    if isinstance(config, Config):
        if config.critic is not None:
            problems += check_optim(config.critic.optim, "critic.optim", config.engine)
            if config.critic.path is None:
                problems += check_freeze(
                    config.critic.optim, "critic.optim", dataclasses.replace(arch, value_head=True)
                )
        problems += [
            *_check_batch(config),
            *_check_positions(config, arch),
            *_check_servers_memory(config),
            *check_objective(config),
            *_check_group_size(config),
            *_check_rewards(config),
            *check_choice(config.rollout),
            *_check_environment(config),
            *_check_servers(config, arch),
            *check_sharing(config, arch, world_size),
            *_check_routing(config, arch),
            *check_replay(config.routing, config.engine),
            *check_stress(config.weights.stress, config.weights.route, arch),
            *_check_evaluation(config),
            *_check_recorded_steps(config),
        ]
    else:
        problems += _check_sft(config, arch)
    raise_all(problems)
    return layout


def _check_batch(config: Config) -> Iterator[str]:
    """All that data.schedule.plan asks of a batch: whatever its samples, it can be cut up for any layout."""
    rollout, train = config.rollout, config.train
    if rollout.prompts_per_step % train.mini_batches:
        yield (
            f"train.mini_batches: {train.mini_batches} does not divide rollout.prompts_per_step "
            f"{rollout.prompts_per_step}; a group is never split"
        )


def _longest(config: Config) -> int:
    return config.data.max_prompt_tokens + config.rollout.max_response_tokens


def _check_positions(config: Config, arch: Architecture) -> Iterator[str]:
    if _longest(config) > arch.max_position_embeddings:
        yield f"{LENGTH_KEYS}: {_longest(config)} is more than the model's {arch.max_position_embeddings} positions"


def _check_servers_memory(config: Config) -> Iterator[str]:
    rollout, longest = config.rollout, _longest(config)
    launches = rollout.replay_from is None and not rollout.servers.are_elsewhere
    tokens = cache_tokens(rollout.servers.max_total_tokens, on_cpu=config.engine.device == "cpu")
    if launches and tokens is not None and longest > tokens:
        default = "" if rollout.servers.max_total_tokens else " (the default on a CPU)"
        yield (
            f"rollout.servers.max_total_tokens: {tokens}{default} is less than {LENGTH_KEYS} {longest}: a server could "
            "not hold one request; set it higher"
        )


def check_companions(config: Config, arch: Architecture, layout: Layout) -> None:
    """Checks reference and critic, which share the policy's layout. Raises ConfigError with all contradictions."""
    problems = []
    reference, critic = config.model.reference, config.critic
    if reference is not None:
        differing = differences(_read("model.reference", reference), arch)
        if differing:
            problems.append(
                f"model.reference: {reference} is of another architecture than model.path: {'; '.join(differing)}"
            )
    if critic is not None and critic.path is not None:
        own = _read("critic.path", critic.path, value_head=True)
        if own.vocab_size != arch.vocab_size:
            problems.append(
                f"critic.path: {critic.path} has a vocabulary of {own.vocab_size} tokens, the policy one of "
                f"{arch.vocab_size}; it must read the policy's tokens"
            )
        problems += check_freeze(critic.optim, "critic.optim", own)
        problems += [f"critic.path: {critic.path}: {problem}" for problem in check_layout(layout, own, config.engine)]
        problems += [f"critic.path: {critic.path}: {problem}" for problem in _check_positions(config, own)]
        if config.engine.aux_loss_coefficient and own.num_layers != arch.num_layers:
            # Megatron-Core logs the load-balancing losses of one process in one tensor, by layer.
            problems.append(
                f"engine.aux_loss_coefficient: {config.engine.aux_loss_coefficient}, but the critic has "
                f"{own.num_layers} layers and the policy {arch.num_layers}; set it to 0"
            )
    raise_all(problems)


def _read(key: str, path: Path, value_head: bool = False) -> Architecture:
    try:
        return read_architecture(path, value_head)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {error}") from None


def _check_group_size(config: Config) -> Iterator[str]:
    advantage = config.objective.advantage
    if not isinstance(advantage, GroupAdvantage) or config.rollout.group_size > 1:
        return
    if (advantage.baseline, advantage.std) != ("none", "none"):
        yield (
            "rollout.group_size: 1 makes every advantage 0; use larger groups, or "
            "objective.advantage.baseline and std none"
        )


def _check_rewards(config: Config) -> Iterator[str]:
    cache, longest = config.reward.overlong_cache, config.rollout.max_response_tokens
    if cache is not None and cache >= longest:
        yield (
            f"reward.overlong_cache: {cache} is not less than rollout.max_response_tokens {longest}: every response "
            "would be punished for its length; set it to a part of that (DAPO's paper: a fifth), or to null"
        )
    correct, wrong = config.reward.correct, config.reward.wrong
    if correct is not None and wrong is not None and correct <= wrong:
        yield f"reward.correct: {correct} is not above reward.wrong {wrong}: right answers would not be preferred"


def _check_environment(config: Config) -> Iterator[str]:
    if config.rollout.environment is not None and config.data.chat_template:
        yield (
            "data.chat_template: true, but rollout.environment makes the prompt's messages; set it to false, and name "
            "the template's renderer in rollout.environment.renderer"
        )


def _check_servers(config: Config, arch: Architecture) -> Iterator[str]:
    servers = config.rollout.servers
    if config.rollout.replay_from is not None:
        return
    for caveat in server_caveats(arch):
        yield f"model.path: {caveat}; such a model trains on saved rollouts only (rollout.replay_from)"
    for flag in flags_among(servers.extra_flags, tuple(TRAINERS_FLAGS)):
        yield f"rollout.servers.extra_flags: {flag} is not for you to set; {TRAINERS_FLAGS[flag]}"
    if servers.are_elsewhere:
        if servers.launch > 1 or servers.extra_flags:
            yield (
                "rollout.servers: launch and extra_flags are for servers that the trainer starts, but urls are given; "
                "drop one or the other"
            )
        if servers.urls_file is not None:
            if servers.urls:
                yield "rollout.servers: urls and urls_file are both given; drop one or the other"
            try:
                read_urls(servers.urls_file, have_key=servers.api_key_env is not None)
            except ConfigError as error:
                yield str(error)
        if (reachable := exposed(servers.urls)) and servers.api_key_env is None:
            yield (
                f"rollout.servers.api_key_env: not set, but other machines reach {reachable[0]}, and without a key may "
                "change its weights and write files; start the servers with a key (megatron-rl serve --api-key-env, or "
                "SGLang's --api-key) and name the environment variable that holds it"
            )
        return
    if servers.api_key_env is not None:
        yield (
            f"rollout.servers.api_key_env: {servers.api_key_env}, but neither urls nor urls_file names servers; those "
            "that the trainer starts get a random key in each run"
        )
    if config.engine.device == "cpu" and (problem := cpu_problem(arch)):
        yield f"engine.device: cpu, but {problem}; {CPU_ADVICE}"
    if arch.num_heads % servers.tp:
        yield f"rollout.servers.tp: {servers.tp} does not divide the {arch.num_heads} attention heads of the model"
    yield from check_server_flags(config)


def _check_routing(config: Config, arch: Architecture) -> Iterator[str]:
    routing = config.routing
    used = {
        f"routing.replay: {routing.replay}": routing.replay != "none",
        "routing.observe_rollout: true": routing.observe_rollout,
        f"routing.noise_floor: {routing.noise_floor}": routing.noise_floor > 0,
        f"objective.router_shift: {config.objective.router_shift}": config.objective.router_shift is not None,
    }
    if not arch.num_experts:
        yield from (f"{key}, but the model has no experts" for key, is_used in used.items() if is_used)
    if not config.train.recompute_old_logprobs:
        without = "but train.recompute_old_logprobs is false: there is no old-log-prob pass to"
        if routing.replay == "r2":
            yield f"routing.replay: r2, {without} record"
        if routing.noise_floor:
            yield f"routing.noise_floor: {routing.noise_floor}, {without} run twice"
    if routing.needs_rollout_routes and config.rollout.replay_from is None:
        for flag in flags_among(config.rollout.servers.extra_flags, UNROUTED_FLAGS):
            yield (
                f"rollout.servers.extra_flags: with {flag} SGLang's routes may be wrong, but routing.replay r3 and "
                "routing.observe_rollout need them"
            )


def _check_recorded_steps(config: Config) -> Iterator[str]:
    if late := [step for step in config.lab.record_steps if step > config.train.steps]:
        yield f"lab.record_steps: {late[0]}, but train.steps is {config.train.steps}; drop the step"


def _check_evaluation(config: Config) -> Iterator[str]:
    evaluation, data = config.eval, config.data
    if data.heldout is not None and holds_out_nothing(data.train, data.heldout):
        yield f"data.heldout: {data.heldout} has the problems of data.train; give it another seed"
    if evaluation.samples > 1 and evaluation.temperature == 0:
        yield (
            f"eval.samples: {evaluation.samples} greedy responses to a prompt are all the same; "
            "set eval.temperature above 0"
        )


def _check_sft(config: SftConfig, arch: Architecture) -> Iterator[str]:
    if config.data.max_tokens > arch.max_position_embeddings:
        yield (
            f"data.max_tokens: {config.data.max_tokens} is more than the model's "
            f"{arch.max_position_embeddings} positions"
        )
