"""Data sets that are made and not read: `arithmetic:SPEC` and `reasoning-gym:SPEC`."""

from __future__ import annotations

from megatron_rl.data import arithmetic_task, gym_task
from megatron_rl.data.arithmetic_task import ArithmeticTask
from megatron_rl.data.gym_task import GymTask


def is_generated(source: str) -> bool:
    return source.startswith((arithmetic_task.PREFIX, gym_task.PREFIX))


def task_of(source: str) -> str:
    """All that decides the records of a generated source and their order. Raises DataError."""
    if source.startswith(gym_task.PREFIX):
        return f"{GymTask.parse(source)!r} {gym_task.version()}"
    return repr(ArithmeticTask.parse(source))


def check_generated(source: str) -> None:
    """Raises DataError if the source cannot be made."""
    if source.startswith(gym_task.PREFIX):
        GymTask.parse(source).make()
    else:
        ArithmeticTask.parse(source).problems()


def holds_out_nothing(train: str, heldout: str) -> bool:
    """Whether both are problems of one generator of reasoning-gym with one seed, so that they are the same problems.
    Raises DataError."""
    if not train.startswith(gym_task.PREFIX) or not heldout.startswith(gym_task.PREFIX):
        return False
    one, other = GymTask.parse(train), GymTask.parse(heldout)
    return (one.name, one.seed, one.settings) == (other.name, other.seed, other.settings)


def default_verifier(source: str) -> str:
    """The verifier of a data set whose records and configuration name none."""
    if source.startswith(gym_task.PREFIX):
        return "reasoning-gym"
    return "arithmetic" if source.startswith(arithmetic_task.PREFIX) else "math"
