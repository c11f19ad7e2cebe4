"""What a run needs of its servers, and what a server's own description says of it. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rl.config.schema import Config
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import Architecture, differences, read_architecture
from megatron_rl.models.fields import read_json_object

SLACK = 4
"""SGLang reports the longest prompt, `max_req_input_len`; a prompt and its response together may have 4 tokens more."""


ADMIN = "start it without --admin-api-key"
"""SGLang then lets the trainer's key in, wherever the other one is asked for."""


class CheckFailed(UserError):
    """The server lacks what the trainer needs. Says how to start it."""


class CannotTell(Exception):
    """A check has no result, and the reason why."""


@dataclass(frozen=True)
class Needs:
    """A run's needs; without a configuration, what is not known is None."""

    model: Path | None = None
    arch: Architecture | None = None
    temperature: float = 0.5
    """At temperature 1 log-probs of the original logits would pass for those of mu."""
    max_tokens: int | None = None
    """Longest prompt and response together."""
    routes: bool | None = None
    shared: Path | None = None
    """Directory in which the run writes weights for the servers; None if it broadcasts them."""

    @classmethod
    def of(cls, config: Config | None, model: Path | None) -> Needs:
        """`model` comes before the configuration's."""
        model = model or (config.model.path if config else None)
        arch = None if model is None else read_architecture(model)
        if config is None:
            return cls(model, arch)
        return cls(
            model,
            arch,
            config.rollout.temperature,
            config.data.max_prompt_tokens + config.rollout.max_response_tokens,
            config.routing.needs_rollout_routes,
            config.run_dir if config.weights.route == "disk" else None,
        )


def explain_refusal(error: Exception) -> str:
    """Says how to fix that a server does not describe itself."""
    if is_unauthorised(error):
        return (
            "it wants another key; give --api-key-env (rollout.servers.api_key_env) the name of the variable that "
            "holds the value of the server's --api-key"
        )
    return "start SGLang there, for example by megatron-rl serve"


def is_unauthorised(error: Exception) -> bool:
    return ": status 401" in str(error)


def check_same_model(served: Mapping[str, Any], needs: Needs) -> str:
    """`served`: the answer of /model_info. Raises CheckFailed and CannotTell."""
    path, kind = str(served.get("model_path")), str(served.get("model_type"))
    if needs.arch is None:
        raise CannotTell(f"serves {path}, a {kind}; give --model or --config to compare it")
    try:
        found = read_architecture(Path(path))
    except (UserError, OSError):
        _check_type(served, needs)
        raise CannotTell(
            f"serves {path}, a {kind}, whose config.json cannot be read here; the first weight sync compares log-probs"
        ) from None
    if differing := differences(found, needs.arch):
        raise CheckFailed(
            f"serves {path}, and not {needs.model}: {'; '.join(differing[:3])}; start it with "
            f"--model-path {needs.model}"
        )
    return f"{path} has the shapes and the vocabulary of {needs.model}"


def _check_type(served: Mapping[str, Any], needs: Needs) -> None:
    assert needs.model is not None
    asked = read_json_object(needs.model / "config.json").get("model_type")
    if served.get("model_type", asked) != asked:
        raise CheckFailed(f"serves a {served['model_type']}, but {needs.model} is a {asked}; start it with that model")


def check_parallelism(info: Mapping[str, Any]) -> str:
    """`info`: the answer of /server_info. Raises CheckFailed."""
    for name, flag in (("pp_size", "--pp-size"), ("dp_size", "--dp-size")):
        if (found := info.get(name, 1)) != 1:
            raise CheckFailed(
                f"{name} is {found}, but weights are broadcast to tensor-parallel ranks alone; start it with {flag} 1"
            )
    return f"tp_size {info.get('tp_size')}, pp_size 1, dp_size 1"


def check_lengths(info: Mapping[str, Any], needs: Needs) -> str:
    """Compares the longest request. `info`: as in check_parallelism. Raises CheckFailed and CannotTell."""
    longest, pool = info.get("max_req_input_len"), info.get("max_total_num_tokens")
    if longest is None or pool is None:
        raise CannotTell("the server says neither max_req_input_len nor max_total_num_tokens")
    limit = longest + SLACK
    fits = f"a prompt and its response together may have {limit} tokens"
    if needs.max_tokens is None:
        raise CannotTell(f"{fits}; give --config to compare it")
    if limit < needs.max_tokens:
        flag = "--max-total-tokens" if pool <= limit + 2 else "--context-length"
        raise CheckFailed(
            f"{fits}, but data.max_prompt_tokens + rollout.max_response_tokens is {needs.max_tokens}: it would cut "
            f"responses; start it with {flag} {needs.max_tokens + 2} or more"
        )
    return f"{fits}, and the KV cache holds {pool}; the run needs {needs.max_tokens}"
