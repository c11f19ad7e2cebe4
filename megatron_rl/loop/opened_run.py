"""Takes the run directory, on rank 0 for all ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import orjson

from megatron_rl.config.load import ConfigError, dump_config
from megatron_rl.config.schema import Config, SftConfig
from megatron_rl.disk import explain
from megatron_rl.errors import UserError
from megatron_rl.lab.prometheus_sink import check_prometheus
from megatron_rl.lab.run import RunDir
from megatron_rl.lab.run_records import Resume
from megatron_rl.lab.wandb_sink import check_wandb
from megatron_rl.loop.progress import check_steps
from megatron_rl.ranks.collectives import broadcast_bytes, together
from megatron_rl.ranks.place import Place
from megatron_rl.stop import NothingLeft


@contextlib.contextmanager
def open_run(config: Config | SftConfig, place: Place, resume: Resume, steps: int) -> Iterator[RunDir]:
    """The run directory, which rank 0 takes and of which it tells the other ranks. Raises ConfigError, on every rank,
    if it cannot or if the run has made more than `steps` steps, and NothingLeft if it has made all."""
    run = RunDir.attach(config.run_dir)
    told = b""
    try:
        with together(place.control):
            if place.rank == 0:
                check_wandb(config.lab.wandb)
                check_prometheus(config.lab.prometheus)
                try:
                    run = RunDir.open(config.run_dir, dump_config(config), resume)
                except UserError:  # some are OSErrors too
                    raise
                except OSError as error:
                    raise ConfigError(f"run_dir {config.run_dir}: {explain(error, config.run_dir)}") from error
                ended = run.ended_after
                if ended is not None:
                    check_steps(config, ended, f"the run in {run.path}")
                told = orjson.dumps([run.resumes, run.origin, ended == steps])
        run.resumes, run.origin, has_ended = orjson.loads(broadcast_bytes(told, place.control))
        if has_ended:
            raise NothingLeft(
                f"nothing is left to do: the run in {run.path} has made all {steps} steps, and its model is in "
                f"{run.path / 'model'}"
            )
        yield run
    finally:
        run.close()
