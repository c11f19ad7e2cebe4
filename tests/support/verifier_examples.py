"""A user's verifiers; tests name them as `verifier_examples:FUNCTION`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

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


def text(prompt: Prompt, response: str) -> str:
    return "1.0"


def by_record(record: dict[str, Any], response: str) -> float:
    """Rewards a response by what the record says of it."""
    return record["scores"][response]


def of_a_group(record: dict[str, Any], responses: list[str], prompt: Prompt) -> list[object]:
    """Judges a group at once: right is what no other response says. The result of a response "x" is no verdict, "wait"
    hangs, and "few" leaves out a result."""
    if "wait" in responses:
        time.sleep(600)
    results: list[object] = [None if each == "x" else responses.count(each) == 1 for each in responses]
    return results[1:] if "few" in responses else results


def with_other_names(question: str, answer: str) -> float:
    return 1.0


def hangs_in_c(prompt: Prompt, response: str) -> Verdict:
    """Computes a large power; no Python signal handler runs until it is done."""
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
    if answer == "7":
        return "is a number"
    if answer == "raises":
        raise KeyError("unit")
    return "'bad' is bad" if answer == "bad" else None


checked.check_answer = check_answer  # type: ignore[attr-defined]


def unanswering(prompt: Prompt, response: str) -> Verdict:
    return Verdict(0.0, False)


def dies_or_hangs(answer: str) -> str | None:
    if answer == "hangs":
        time.sleep(600)
    return check_answer(answer)


unanswering.check_answer = dies_or_hangs  # type: ignore[attr-defined]


def sees_gpus(prompt: Prompt, response: str) -> Verdict:
    raise RuntimeError(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))


def raises_what_it_is_told(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        raise {
            kind.__name__: kind
            for kind in (RecursionError, MemoryError, SystemExit, KeyboardInterrupt, GeneratorExit, Unprintable)
        }[prompt.answer]("a reason")
    return Verdict(1.0, True)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


def recurses(prompt: Prompt, response: str) -> Verdict:
    return recurses(prompt, response) if response == "b" else Verdict(1.0, True)


def hogs(prompt: Prompt, response: str) -> Verdict:
    """Allocates 1 GiB."""
    held = bytearray(1 << 30) if response == "b" else b"1"
    return Verdict(float(len(held) > 0), True)


def closes_descriptors(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        os.closerange(3, 65536)
        time.sleep(600)
    return Verdict(1.0, True)


def stops(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        os.kill(os.getpid(), signal.SIGSTOP)
    return Verdict(1.0, True)


def stops_with_child(prompt: Prompt, response: str) -> Verdict:
    """Starts a child in its own session, which no signal to the process group reaches."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", prompt.answer], start_new_session=True)
    return stops(prompt, response)


def open_descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd") if int(name) > 2]


def writes_to_every_descriptor(prompt: Prompt, response: str) -> Verdict:
    if response == "b":
        for descriptor in open_descriptors():
            with contextlib.suppress(OSError):
                os.write(descriptor, b'{"reward": 1.0, "correct": true}' * 20)
    print('{"reward": 1.0, "correct": true}', flush=True)
    return Verdict(1.0, True)


def forges_a_reply(prompt: Prompt, response: str) -> Verdict:
    """Writes frames of the protocol itself; they must not be read as verdicts of later answers."""
    data = b'{"id": 77, "reward": 9.0, "correct": true}'
    for descriptor in open_descriptors() if response == "b" else ():
        with contextlib.suppress(OSError):
            os.write(descriptor, len(data).to_bytes(8, "little") + data)
    return Verdict(1.0, True)


def sees_environment(prompt: Prompt, response: str) -> Verdict:
    raise RuntimeError(" ".join(sorted(os.environ)) + " values " + " ".join(os.environ.values()))


def sees_modules(prompt: Prompt, response: str) -> Verdict:
    return Verdict(float("torch" in sys.modules), True)


def is_slow_to_read(prompt: Prompt, response: str) -> Verdict:
    return Verdict(float(len(response)), True)


def loses_some(prompt: Prompt, response: str) -> Verdict:
    """Loses verdicts of wrong answers to every other prompt; a prompt's text starts with its number."""
    if int(prompt.text.split()[0]) % 2 and response != prompt.answer:
        raise RuntimeError("lost")
    return Verdict(float(response == prompt.answer), response == prompt.answer)


_called: list[str] = []


def loses_all_later(prompt: Prompt, response: str) -> Verdict:
    """Loses all verdicts from the fifth prompt on, but that of its process's first call, which is the start's trial."""
    is_trial = not _called
    _called.append(prompt.id)
    if int(prompt.text.split()[0]) >= 4 and not is_trial:
        raise RuntimeError("lost")
    return Verdict(float(response == prompt.answer), response == prompt.answer)


def longer(prompt: Prompt, response: str) -> Verdict:
    return Verdict(len(response) / 10, False)
