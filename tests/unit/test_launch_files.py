"""The files of `launch`: what the script and the manifests say, and which requests are refused."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from jobset_schema import JOBSET
from typer.testing import CliRunner

from megatron_rl.cli import app
from megatron_rl.config.load import ConfigError, load_config
from megatron_rl.config.schema import Config
from megatron_rl.errors import FileInTheWayError
from megatron_rl.launch.cluster_files import manifests, slurm_script
from megatron_rl.launch.cluster_job import ClusterJob, Nodes, plan_job
from megatron_rl.launch.site import Site

COLOCATED = ("rollout.servers.colocate=true", "rollout.servers.launch=4", "weights.route=ipc")


@pytest.fixture
def config(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A configuration for GPUs, whose run directory is below tmp_path."""
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
presets: [grpo]
run_dir: {tmp_path / "a run"}
model: {{path: {tiny_model_dir}}}
engine: {{device: cuda}}
parallel: {{tp: 2, ep: 4}}
optim: {{lr: 1.0e-6}}
routing: {{replay: r3}}
data: {{train: "arithmetic:terms=2,split=train,count=100", max_prompt_tokens: 64}}
rollout: {{max_response_tokens: 128, servers: {{tp: 4, extra_flags: [--mem-fraction-static=0.8]}}}}
train: {{steps: 3}}
"""
    )
    return file


def planned(config: Path, *overrides: str, trainers: int = 2, servers: int = 3, gpus: int = 8) -> ClusterJob:
    return plan_job(config, overrides, Nodes(trainers, servers, gpus))


def kubernetes(config: Path, tmp_path: Path) -> dict[str, list[Any]]:
    site = Site.model_validate({"kubernetes": {"mount": tmp_path.parent.parent, "node_selector": ["pool=gpu"]}})
    files = manifests(planned(config), site)
    return {name: list(yaml.safe_load_all(text)) for name, text in files.items()}


def words_after(script: str, marker: str) -> list[str]:
    """Returns the words of the script's line that begins with `marker`."""
    (line,) = [line for line in script.splitlines() if line.strip().startswith(marker)]
    return shlex.split(line.strip().removesuffix("\\"))


# ---- Slurm -----------------------------------------------------------------------------------------------------


def test_bash_reads_the_script(config: Path) -> None:
    for job in (planned(config), planned(config, *COLOCATED, servers=0)):
        script = slurm_script(job, Site())
        checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert checked.stderr == ""


def test_the_script_asks_for_all_nodes_and_gives_each_server_its_gpus(config: Path) -> None:
    script = slurm_script(planned(config), Site())
    assert "#SBATCH --nodes=5\n" in script
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "--nodes=3 --ntasks-per-node=2 " in script
    assert "first=$((SLURM_LOCALID * 4))" in script
    assert "seq -s, $first $((first + 3))" in script


def test_the_servers_are_those_of_the_configuration(config: Path, tiny_model_dir: Path) -> None:
    words = words_after(slurm_script(planned(config), Site()), str(tiny_model_dir))
    begin, end = words[: words.index("--")], words[words.index("--") + 1 :]
    assert begin[1:] == ["--device", "cuda", "--dtype", "bf16", "--tp", "4", "--api-key-env", "MEGATRON_RL_SERVER_KEY"]
    assert end == ["--max-running-requests", "256", "--mem-fraction-static=0.8", "--enable-return-routed-experts", "&"]


def test_the_trainer_gets_the_servers_by_a_file_and_no_flags_of_theirs(config: Path, tmp_path: Path) -> None:
    words = words_after(slurm_script(planned(config), Site()), "-m megatron_rl train")
    told = [word for word in words if word.startswith("rollout.servers.")]
    logs = tmp_path / "a run" / "logs"
    assert told == [
        f'rollout.servers.urls_file="{logs / "servers.txt"}"',
        "rollout.servers.api_key_env=MEGATRON_RL_SERVER_KEY",
        "rollout.servers.extra_flags=[]",
    ]


def test_own_servers_take_gpus_of_their_node_from_the_ranks(config: Path) -> None:
    one = planned(config, "rollout.servers.launch=1", trainers=1, servers=0)
    script = slurm_script(one, Site())
    assert "#SBATCH --gpus-per-node=8\n" in script
    assert "--nproc-per-node 4 " in script
    colocated = slurm_script(planned(config, *COLOCATED, servers=0), Site())
    assert "#SBATCH --gpus-per-node=8\n" in colocated
    assert "--nproc-per-node 8 " in colocated
    assert "servers.txt" not in colocated


def test_the_trainer_reads_the_file_of_urls_that_the_script_writes(config: Path, tmp_path: Path) -> None:
    """Overrides are YAML, to which # and : mean something."""
    for name in ("x #1: {y}", "[a", '"q"', "-x"):
        job = planned(config, f"run_dir={json.dumps(name)}")
        (told,) = [
            word for word in words_after(slurm_script(job, Site()), "-m megatron_rl train") if "urls_file" in word
        ]
        path = Path.cwd() / name / "logs" / "servers.txt"
        (tmp_path / "override.yaml").write_text(told.replace("rollout.servers.urls_file=", "urls_file: "))
        assert yaml.safe_load((tmp_path / "override.yaml").read_text()) == {"urls_file": str(path)}


def test_a_percent_sign_in_the_run_directory_is_none_of_slurms(config: Path, tmp_path: Path) -> None:
    """srun would put the job's number for %j into the name of a server's log, and nowhere else."""
    script = slurm_script(planned(config, f"run_dir={tmp_path / 'a%j'}"), Site())
    (line,) = [line for line in script.splitlines() if "server-%N-%t.log" in line]
    shown = subprocess.run(
        ["bash", "-c", f"logs={tmp_path}/a%j/logs; echo {line.strip().partition(' ')[0]}"],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.strip() == f"--output={tmp_path}/a%%j/logs/server-%N-%t.log"


def test_a_cpu_job_asks_for_no_gpu(config: Path) -> None:
    script = slurm_script(planned(config, "engine.device=cpu", "engine.dtype=fp32"), Site())
    assert "gpus" not in script
    assert "CUDA" not in script


# ---- Kubernetes ------------------------------------------------------------------------------------------------


def test_the_manifests_fit_the_schemas_of_kubernetes(config: Path, tmp_path: Path) -> None:
    files = kubernetes(config, tmp_path)
    (settings, jobset), servers = files["trainer.yaml"], files["servers.yaml"]
    (trainer,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "trainer"}, **trainer["template"]}
    for manifest in (settings, job, *servers):
        kubernetes_validate.validate(manifest, "1.37", strict=True)
    jsonschema.validate(jobset, JOBSET)


def test_a_misspelt_field_does_not_fit(config: Path, tmp_path: Path) -> None:
    files = kubernetes(config, tmp_path)
    jobset, (_, servers) = files["trainer.yaml"][1], files["servers.yaml"]
    jobset["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, JOBSET)
    servers["spec"]["template"]["spec"]["containers"][0]["startupProbe"]["path"] = "/health"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(servers, "1.37", strict=True)


def test_the_trainer_knows_every_server_by_name(config: Path, tmp_path: Path) -> None:
    files = kubernetes(config, tmp_path)
    settings, _ = files["trainer.yaml"]
    service, servers = files["servers.yaml"]
    (tmp_path / "pod.yaml").write_text(settings["data"]["run.yaml"])
    found = load_config(Config, tmp_path / "pod.yaml")
    name = servers["metadata"]["name"]
    assert service["metadata"]["name"] == servers["spec"]["serviceName"] == name
    assert service["spec"]["selector"] == servers["spec"]["template"]["metadata"]["labels"]
    assert servers["spec"]["replicas"] == 6
    assert found.rollout.servers.urls == tuple(f"http://{name}-{number}.{name}:30000" for number in range(6))
    assert found.objective == planned(config).config.objective


def test_the_key_is_a_reference_to_a_secret(config: Path, tmp_path: Path) -> None:
    files = kubernetes(config, tmp_path)
    for pod in (
        files["trainer.yaml"][1]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"],
        files["servers.yaml"][1]["spec"]["template"],
    ):
        (container,) = pod["spec"]["containers"]
        (key,) = [each for each in container["env"] if each["name"] == "MEGATRON_RL_SERVER_KEY"]
        assert key["valueFrom"] == {"secretKeyRef": {"name": "megatron-rl-server-key", "key": "key"}}


def test_paths_that_pods_would_not_see_are_refused(config: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        manifests(planned(config), Site())
    assert [line.partition(":")[0] for line in str(refused.value).splitlines()] == ["model.path", "run_dir"]
    assert "mounted at /work" in str(refused.value)


def test_pods_start_here_if_they_see_this_directory(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative paths, and own code in the working directory, are found from there."""
    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    site = Site.model_validate({"kubernetes": {"mount": tmp_path.parent.parent}})
    (here / "urls.txt").write_text("http://10.0.0.1:30000\n")
    urls = ("rollout.servers.urls_file=urls.txt", "rollout.servers.api_key_env=THEIR_KEY")
    own = ("run_dir=runs/one", *urls, "rollout.servers.extra_flags=[]", "data.verifier=scores:mine")
    (here / "scores.py").write_text("raise SystemExit('nothing is run')\n")
    files = manifests(planned(config, *own, servers=0), site)
    pod = yaml.safe_load_all(files["trainer.yaml"])
    (trainer,) = list(pod)[1]["spec"]["replicatedJobs"]
    (container,) = trainer["template"]["spec"]["template"]["spec"]["containers"]
    assert container["workingDir"] == str(here)
    (key,) = [variable for variable in container["env"] if "valueFrom" in variable]
    assert key["name"] == "THEIR_KEY"
    assert list(files) == ["trainer.yaml"]


def test_what_pods_would_lack_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "elsewhere"
    here.mkdir()
    (here / "scores.py").write_text("")
    monkeypatch.chdir(here)
    mount = tmp_path / "volume"
    site = Site.model_validate({"kubernetes": {"mount": mount}})
    lacking = ("run_dir=runs/one", "data.verifier=scores:mine", "lab.wandb={project: p}", "reward.environment=[JUDGE]")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(ConfigError) as refused:
        manifests(planned(config, *lacking), site)
    told = str(refused.value).splitlines()
    assert [line.partition(":")[0] for line in told] == [
        "model.path",
        "run_dir",
        "data.verifier",
        "reward.environment",
        "lab.wandb",
    ]
    assert str(here / "scores.py") in told[2]
    assert "kubernetes.trainer_secrets" in told[4]


def test_own_code_below_the_volume_that_pods_would_not_import_is_refused(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    (library / "judges.py").write_text("")
    monkeypatch.syspath_prepend(library)
    monkeypatch.chdir(tmp_path)
    site = Site.model_validate({"kubernetes": {"mount": tmp_path.parent.parent}})
    with pytest.raises(ConfigError, match=r"data\.verifier: .*judges\.py, but pods import what is installed"):
        manifests(planned(config, "run_dir=run", "data.verifier=judges:mine"), site)
    monkeypatch.chdir(library)
    manifests(planned(config, "run_dir=run", "data.verifier=judges:mine"), site)


def test_secrets_of_the_trainer_are_its_variables(config: Path, tmp_path: Path) -> None:
    site = Site.model_validate({"kubernetes": {"mount": tmp_path.parent.parent, "trainer_secrets": ["wandb", "judge"]}})
    files = manifests(planned(config, "lab.wandb={project: p}"), site)
    (trainer,) = list(yaml.safe_load_all(files["trainer.yaml"]))[1]["spec"]["replicatedJobs"]
    kubernetes_validate.validate({"apiVersion": "batch/v1", "kind": "Job", **trainer["template"]}, "1.37", strict=True)
    (container,) = trainer["template"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}, {"secretRef": {"name": "judge"}}]


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "sizes", "told"),
    [
        (["parallel.tp=3"], {}, "parallel"),
        ([], {"trainers": 1, "gpus": 3}, "does not divide the world of 3 ranks"),
        (["rollout.servers.tp=1", "parallel.ep=1"], {"trainers": 1, "gpus": 5}, "does not divide the world of 5"),
        (COLOCATED, {}, "rollout.servers.colocate"),
        (["rollout.servers.urls=[http://127.0.0.1:1]", "rollout.servers.extra_flags=[]"], {}, "run already"),
        ([], {"gpus": 2, "trainers": 4}, "rollout.servers.tp: 4 does not divide the 2 GPUs of a node"),
        ([], {"servers": 0}, "give servers nodes of their own"),
        (
            ["rollout.servers.launch=2"],
            {"trainers": 1, "servers": 0},
            "take 8 (rollout.servers.launch times rollout.servers.tp), which leaves none",
        ),
        (
            ["rollout.servers.tp=1", "parallel.ep=1"],
            {"trainers": 1, "servers": 0},
            "servers of the run take 1 (rollout.servers.launch times rollout.servers.tp), which leaves 7 ranks",
        ),
        ([], {"trainers": 99_999}, "800016 GPUs in all"),
    ],
)
def test_what_does_not_fit_is_refused(config: Path, overrides: Sequence[str], sizes: dict[str, int], told: str) -> None:
    with pytest.raises(ConfigError, match=r".") as refused:
        planned(config, *overrides, **sizes)
    assert told in str(refused.value)


def test_a_file_that_is_there_is_not_overwritten(config: Path, tmp_path: Path) -> None:
    words = ["launch", str(config), "--nodes", "2", "--rollout-nodes", "3", "--slurm", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, words)
    assert first.stdout == f"sbatch {tmp_path / 'megatron-rl.sbatch'}\n"
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, FileInTheWayError)
    assert "megatron-rl.sbatch is there already" in str(again.exception)


def test_one_kind_of_cluster_is_asked_for(config: Path) -> None:
    for kinds in ([], ["--slurm", "--kubernetes"]):
        done = CliRunner().invoke(app, ["launch", str(config), *kinds])
        assert done.exit_code == 2
        assert "one of --slurm and --kubernetes" in done.output


@pytest.mark.parametrize(
    "words",
    [
        ["launch", "--slurm", "--nodes", "9" * 20],
        ["launch", "--slurm", "--gpus-per-node", "1025"],
        ["plan", "--gpus", "2147483648"],
        ["train", "--dry-run", "--world-size", "9" * 23],
        ["check", "--world-size", "1000003"],
        ["serve", "--tp", "1000000"],
    ],
)
def test_counts_beyond_any_cluster_are_refused(config: Path, words: list[str]) -> None:
    first = config.parent if words[0] == "serve" else config
    done = CliRunner().invoke(app, [words[0], str(first), *words[1:]])
    assert done.exit_code == 2
    assert "less than or equal to" in done.output


def test_the_printed_command_can_be_copied(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "my files"
    words = ["launch", str(config), "--nodes", "2", "--rollout-nodes", "3", "--slurm", "--out", str(out)]
    assert shlex.split(CliRunner().invoke(app, words).stdout) == ["sbatch", str(out / "megatron-rl.sbatch")]
