"""Tries a user's verifier before anything is sampled: what it returns shows only when it is called."""

from __future__ import annotations

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.rewards.judges import Failure, Judges, ResponseTask
from megatron_rl.rewards.verifiers import VERIFIERS, RewardError


def try_verifier(pool: Judges, prompt: Prompt) -> Verdict | None:
    """Has the prompt's verifier judge the reference answer as if it were a response; None if the verifier is built in.

    Raises RewardError, which names data.verifier and the prompt, if there is no verdict.
    """
    if prompt.verifier in VERIFIERS:
        return None
    (result,) = pool.judge(prompt.verifier, [ResponseTask(prompt, prompt.answer)])
    if isinstance(result, Failure):
        fix = (
            "raise reward.timeout or reward.memory_mib if it needs more" if result.silent else "it must judge any text"
        )
        raise RewardError(
            f"data.verifier: verifier {prompt.verifier!r} has no verdict on the response {prompt.answer[:100]!r}, the "
            f"reference answer of prompt {prompt.id!r}: {result.reason}; {fix}"
        )
    return result
