"""Fills the templates of a cluster's files, and writes or prints them."""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_rl.disk import writes
from megatron_rl.errors import FileInTheWayError
from megatron_rl.launch.cluster_job import FIRST_PORT, ClusterJob
from megatron_rl.launch.site import Site
from megatron_rl.rollout.sglang_launch import KEY_VARIABLE


def write(job: ClusterJob, site: Site, kubernetes: bool, out: Path | None) -> None:
    """Prints the files, or writes them into `out` and prints what to do next.

    Raises FileInTheWayError, before anything is written, if a file is there already.
    """
    files = manifests(job, site) if kubernetes else {f"{site.name}.sbatch": slurm_script(job, site)}
    if out is None:
        print("---\n".join(files.values()), end="")
        return
    paths = {out / name: text for name, text in files.items()}
    if taken := [path for path in paths if path.exists()]:
        raise FileInTheWayError(f"--out: {taken[0]} is there already; remove it, or give another directory")
    with writes(f"--out {out}", out):
        out.mkdir(parents=True, exist_ok=True)
        for path, text in paths.items():
            path.write_text(text)
    print(*("kubectl apply" if kubernetes else "sbatch", *((f"-f {p}" if kubernetes else str(p)) for p in paths)))


def slurm_script(job: ClusterJob, site: Site) -> str:
    """Returns the text of a script for sbatch."""
    logs = job.run_dir / "logs"
    return _fill(
        "slurm.sbatch",
        job=job,
        site=site,
        directory=Path.cwd(),
        logs=logs,
        train=[*job.command, *job.trainer_overrides(f"urls_file={logs / 'servers.txt'}")],
    )


def _fill(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("megatron_rl.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quoted": _quoted}
    version = importlib.metadata.version("megatron_rl")
    return environment.get_template(template).render(version=version, key=KEY_VARIABLE, first_port=FIRST_PORT, **values)


def _quoted(words: object) -> str:
    """Returns a word, or a sequence of words, as a shell reads it."""
    many = isinstance(words, Sequence) and not isinstance(words, str)
    return shlex.join(map(str, words)) if many else shlex.quote(str(words))
