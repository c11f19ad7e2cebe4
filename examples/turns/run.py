"""Trains a small model on conversations: with a calculator, or in a guessing game.

    python examples/turns/run.py calculator
    python examples/turns/run.py guessing

Fine-tunes a random model on one turn after another of conversations that a script has played, trains it by RL with the
real environment, and prints the held-out accuracy. Everything is kept under .demo/turns.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import orjson

from megatron_rl.data.arithmetic_task import ArithmeticTask, prompt_text
from megatron_rl.data.sample import Prompt
from megatron_rl.environments.calculator import Calculator
from megatron_rl.environments.env import Env
from megatron_rl.environments.guessing import Guessing

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
WORK = Path(".demo/turns")
ALPHABET = "0123456789+=#<>?"
GAMES = 4000
TURNS = 3
NUMBERS = 7  # 1 to 7, which halving finds within three guesses

Policy = Callable[[list[str]], str]
"""Returns the next message after the prompt and the environment's answers."""


def use_the_tool(prompt: Prompt) -> Policy:
    return lambda heard: heard[0] if len(heard) == 1 else f"#{heard[-1]}"


def guess_at_random(prompt: Prompt) -> Policy:
    """Guesses without listening: what to make of the answers is left to RL."""
    rng = np.random.default_rng(int(prompt.id))
    return lambda heard: str(rng.integers(1, NUMBERS + 1))


def turns(env: Env, policy: Policy, prompt: Prompt) -> Iterator[dict[str, str]]:
    """Yields each turn as an example of its own: what came before, and what the policy says."""
    history, heard, done = prompt.text, [prompt.text], False
    env.reset(prompt)
    while not done:
        said = policy(heard)
        yield {"prompt": history, "response": said}
        messages, _, done = env.step({"role": "assistant", "content": said})
        heard += [message["content"] for message in messages]
        history += f"{said}<eos>" + "".join(message["content"] for message in messages)


def calculator_prompts() -> list[Prompt]:
    problems = ArithmeticTask(terms=6, count=GAMES).problems()
    return [Prompt(str(n), prompt_text(terms), (), "", "") for n, terms in enumerate(problems)]


def guessing_prompts() -> list[Prompt]:
    secrets = np.random.default_rng(0).integers(1, NUMBERS + 1, GAMES).tolist()
    return [Prompt(str(n), "?", (), str(secret), "") for n, secret in enumerate(secrets)]


EXAMPLES: dict[str, tuple[type[Env], Callable[[Prompt], Policy], Callable[[], list[Prompt]]]] = {
    "calculator": (Calculator, use_the_tool, calculator_prompts),
    "guessing": (Guessing, guess_at_random, guessing_prompts),
}


def write_data(name: str) -> None:
    env, policy, make_prompts = EXAMPLES[name]
    prompts = make_prompts()
    examples = [each for prompt in prompts for each in islice(turns(env(), policy(prompt), prompt), TURNS)]
    write_lines(WORK / f"{name}-sft.jsonl", examples)
    if name == "guessing":
        numbers = [{"id": str(n), "prompt": "?", "answer": str(n)} for n in range(1, NUMBERS + 1)]
        write_lines(WORK / "numbers.jsonl", numbers)


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))


def run(*command: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([sys.executable, *command], check=True)


def cold_start(name: str) -> None:
    if (WORK / f"{name}-cold-start").is_dir():
        return
    write_data(name)
    if not (WORK / "random").is_dir():
        sizes = ("--layers", "3", "--hidden", "96", "--experts", "8", "--top-k", "2")
        run("-m", "megatron_rl.demo.demo_model", str(WORK / "random"), "--alphabet", ALPHABET, *sizes)
    shutil.rmtree(WORK / f"{name}-sft", ignore_errors=True)
    run("-m", "megatron_rl", "sft", str(HERE / f"{name}-sft.yaml"))
    (WORK / f"{name}-sft" / "model").rename(WORK / f"{name}-cold-start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(EXAMPLES))
    name = parser.parse_args().name
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cold_start(name)
    shutil.rmtree(WORK / name, ignore_errors=True)
    run("-m", "megatron_rl", "train", str(HERE / f"{name}.yaml"))

    from megatron_rl.lab.run import read_metrics

    evaluations = read_metrics(WORK / name / "eval.jsonl")
    before, after = (each["avg_at_k"] for each in (evaluations[0], evaluations[-1]))
    print(f"held-out accuracy: {before:.2f} -> {after:.2f}")


if __name__ == "__main__":
    main()
