"""A user's verifiers, as the tests name them: `verifier_examples:FUNCTION`."""

from __future__ import annotations

import os

from megatron_rl.data.sample import Prompt, Verdict

NOT_A_FUNCTION = 3


def shaped(prompt: Prompt, response: str) -> Verdict:
    print("a verifier may print")
    correct = response == prompt.answer
    return Verdict(1.0 if correct else -0.5 - len(prompt.token_ids), correct)


def raises(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        raise KeyError("unit")
    return Verdict(0.0, False)


def infinite(prompt: Prompt, response: str) -> Verdict:
    return Verdict(float("inf"), True)


def not_a_number(prompt: Prompt, response: str) -> Verdict:
    return Verdict(float("nan"), response == "b")


def bare_number(prompt: Prompt, response: str) -> float:
    return 1.0


def hangs_in_c(prompt: Prompt, response: str) -> Verdict:
    """No Python signal handler runs until the power is computed."""
    if response == "b":
        pow(9, 9**9**2)
    return Verdict(1.0, True)


def dies(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        os._exit(3)
    return Verdict(1.0, True)


def whose_process(prompt: Prompt, response: str) -> Verdict:
    return Verdict(float(os.getpid()), True)


def checked(prompt: Prompt, response: str) -> Verdict:
    return Verdict(0.0, False)


def check_answer(answer: str) -> str | None:
    if answer == "dies":
        os._exit(3)
    if answer == "raises":
        raise KeyError("unit")
    return "'bad' is bad" if answer == "bad" else None


checked.check_answer = check_answer
