"""Fills the templates of a cluster's files, and writes or prints them."""

from __future__ import annotations

import importlib.metadata
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_rl.config.load import dump_config
from megatron_rl.disk import writes
from megatron_rl.errors import FileInTheWayError
from megatron_rl.launch.cluster_job import FIRST_PORT, ClusterJob
from megatron_rl.launch.pods import check_pods, working_directory
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
    words = (
        ["kubectl", "apply", *(word for path in paths for word in ("-f", path))] if kubernetes else ["sbatch", *paths]
    )
    print(_quoted(words))


def slurm_script(job: ClusterJob, site: Site) -> str:
    """Returns the text of a script for sbatch."""
    logs = Path.cwd() / job.run_dir / "logs"
    return _fill(
        "slurm.sbatch",
        job=job,
        site=site,
        directory=Path.cwd(),
        logs=logs,
        train=[*job.command, *job.trainer_overrides(f"urls_file={_yaml(logs / 'servers.txt')}")],
    )


def manifests(job: ClusterJob, site: Site) -> dict[str, str]:
    """Returns the texts of manifests by file name. Raises ConfigError for what pods would not see."""
    check_pods(job.config, site.kubernetes)
    servers = job.nodes.servers * job.servers_per_node
    name = f"{site.name}-servers"
    urls = [f"http://{name}-{number}.{name}:{FIRST_PORT}" for number in range(servers)]
    config = job.trainer_config(urls)
    known = {"job": job, "site": site, "k8s": site.kubernetes, "directory": working_directory(site.kubernetes)}
    key = config.rollout.servers.api_key_env
    files = {"trainer.yaml": _fill("jobset.yaml", config=dump_config(config).rstrip(), servers_key=key, **known)}
    if servers:
        files["servers.yaml"] = _fill("servers.yaml", servers=servers, **known)
    return files


def _fill(template: str, **values: object) -> str:
    environment = Environment(
        loader=PackageLoader("megatron_rl.launch"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"quoted": _quoted, "yaml": _yaml}
    version = importlib.metadata.version("megatron_rl")
    return environment.get_template(template).render(version=version, key=KEY_VARIABLE, first_port=FIRST_PORT, **values)


def _quoted(words: object) -> str:
    """Returns a word, or a sequence of words, as a shell reads it."""
    if isinstance(words, Sequence) and not isinstance(words, str):
        return shlex.join(map(str, words))
    return shlex.quote(str(words))


def _yaml(value: object) -> str:
    """Returns a value as YAML reads it in one line: JSON is YAML."""
    return json.dumps(value, default=str)
