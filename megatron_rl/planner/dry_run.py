"""What `train --dry-run` and `sft --dry-run` print: all that can be said of a configuration without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rl.config.load import C, dump_config
from megatron_rl.config.resolve import resolve
from megatron_rl.config.schema import SftConfig
from megatron_rl.config.show import show_layout, show_schedule, show_sizes
from megatron_rl.lab.alarms import check_alarms
from megatron_rl.planner.forecast import memory_lines
from megatron_rl.planner.memory import Job
from megatron_rl.ranks.agreement import tell
from megatron_rl.ranks.world import read_world


def show(cls: type[C], path: Path, overrides: Sequence[str], world_size: int | None) -> None:
    """Opens no data, imports no code of the user's and asks no server: it says which command does. Raises
    ConfigError."""
    resolved = resolve(cls, path, overrides, world_size or read_world().size)
    check_alarms(resolved.config.lab.alarms)
    tell(resolved.notes)
    print(dump_config(resolved.config))
    show_layout(resolved.layout, resolved.arch, resolved.config.engine)
    show_sizes(resolved.arch)
    show_schedule(resolved.config, resolved.layout)
    print(memory_lines(Job(resolved.config, resolved.arch, resolved.layout)))
    kind = " --sft" if cls is SftConfig else ""
    ranks = f" --world-size {world_size}" if world_size else ""
    command = f"megatron-rl check {path}{kind}{ranks}"
    print(f"nothing was opened: `{command}` opens weights, tokenizer, data, own code and servers")
