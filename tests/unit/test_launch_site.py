"""The site file of `launch`: what the cluster would refuse is refused before, with file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_rl.config.load import ConfigError
from megatron_rl.launch.site import Site, read_site, seconds_of


def test_mistakes_of_a_site_file_are_named_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("name: My_Run\nslurm:\n  time: 1 day\n  partition: gpu\n")
    with pytest.raises(ConfigError) as refused:
        read_site(file)
    assert [line.split(" ")[:2] for line in str(refused.value).splitlines()] == [
        [f"{file}:1:", "name:"],
        [f"{file}:3:", "slurm.time:"],
        [f"{file}:4:", "slurm.partition:"],
    ]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("slurm.time", "99:99:99", "above 0"),
        ("slurm.time", "0", "above 0"),
        ("slurm.time", "1-24:00:00", "above 0"),
        ("slurm.time", "11:00", "660 s; expected more than slurm.warning, 600 s"),
        ("slurm.warning", 86400, "65535"),
        ("slurm.options", ["rm -rf x"], "an option of sbatch"),
        ("slurm.options", ["--comment=1\n"], "one line"),
        ("slurm.options", ["--nodes=3"], "does not set itself"),
        ("slurm.options", ["--sig=TERM@60"], "does not set itself"),
        ("slurm.options", ["-t 5"], "does not set itself"),
        ("slurm.options", ["--no-requeue"], "does not set itself"),
        ("slurm.time", 60, "put it in quotes"),
        ("slurm.setup", ". .venv/bin/activate", "a list such as [a, b]"),
        ("slurm.setup", ["if true; then"], "lines of bash"),
        ("kubernetes.claim", "My claim", "such as my-claim"),
        ("kubernetes.secret", "a/b", "at most 253"),
        ("kubernetes.trainer_secrets", ["UPPER"], "at most 253"),
        ("kubernetes.image", "no image", "an image"),
        ("kubernetes.shared_memory", "lots", "such as 64Gi"),
        ("kubernetes.shared_memory", "0Gi", "such as 64Gi"),
        ("kubernetes.mount", "/", "an absolute path"),
        ("kubernetes.mount", "work", "an absolute path"),
        ("kubernetes.mount", "/etc", "an absolute path"),
        ("kubernetes.namespace", "-team", "at most 63"),
        ("kubernetes.namespace", "n" * 64, "at most 63"),
        ("kubernetes.node_selector", ["a b=c"], "a label"),
        ("kubernetes.node_selector", ["pool=a b"], "a label"),
        ("kubernetes.node_selector", ["pool"], "a label"),
    ],
)
def test_what_the_cluster_would_refuse_later_is_refused(tmp_path: Path, key: str, value: object, told: str) -> None:
    section, _, name = key.partition(".")
    file = tmp_path / "site.yaml"
    file.write_text(yaml.safe_dump({section: {name: value}}))
    with pytest.raises(ConfigError) as refused:
        read_site(file)
    (line,) = str(refused.value).splitlines()
    assert key in line
    assert told in line


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "slurm:\n  # time: 1:00:00\n"])
def test_a_site_without_keys_has_the_defaults(tmp_path: Path, text: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    assert read_site(file) == Site()


def test_what_a_cluster_takes_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    given = {
        "slurm": {
            "time": "12",
            "warning": 600,
            "options": ["--partition=gpu", "-A mine", "--nodelist=n1", "--time-min=1:00:00", "-C gpu&fast"],
            "setup": ["if true; then", "  echo 1", "fi"],
        },
        "kubernetes": {
            "namespace": "2-team-" + "x" * 50,
            "claim": "a.b-c",
            "image": "host.example:5000/team/megatron_rl:v0.2@sha256:" + "0" * 64,
            "shared_memory": "500M",
            "mount": "/mnt/data",
            "node_selector": ["node.kubernetes.io/instance-type=p5.48xlarge", "pool="],
        },
    }
    file.write_text(yaml.safe_dump(given))
    assert read_site(file).model_dump(mode="json", exclude_unset=True) == given


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("10:30", 630),
        ("24:00:00", 86400),
        ("2-12", 216_000),
        ("1-00:30", 88_200),
        ("1-1:1:1", 0),
        ("1-01:01:01", 90_061),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds
