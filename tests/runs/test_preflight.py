"""`megatron-rl check`: a line for each thing that a start opens, and the same errors at a start before servers."""

from __future__ import annotations

import json
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chat_tokenizer import make_chat_tokenizer
from forks import Forks, Run
from paths import ROOT
from tiny_models import make_tiny_model

from megatron_rl.rollout.server import Server, free_ports

RL = """\
run_dir: run
model: {path: model}
engine: {device: cpu, dtype: fp32}
data: {train: data.jsonl, verifier: "mine:judge", max_prompt_tokens: 16}
objective: {custom: "mine:loss"}
rollout: {max_response_tokens: 32}
train: {steps: 1}
"""
SFT = """\
run_dir: run
model: {path: model}
engine: {device: cpu, dtype: fp32}
data: {train: data.jsonl, response_field: answer, max_tokens: 16}
steps: 1
"""
MINE = """
def judge(record, response):
    return record["points"].get(response, 0)

def names(response):
    return response

def loss(inputs, config, denominators): ...

def old_loss(logprobs, advantages): ...
"""
RECORD = {"prompt": "1+1=", "answer": "2", "points": {"2": 0.5}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, data, own code, run.yaml and sft.yaml."""
    root = tmp_path_factory.mktemp("preflight")
    make_tiny_model(root / "model", num_layers=1)
    for name, text in (("run.yaml", RL), ("sft.yaml", SFT), ("mine.py", MINE)):
        (root / name).write_text(text)
    (root / "data.jsonl").write_text(json.dumps(RECORD) + "\n")
    (root / "long.jsonl").write_text(json.dumps({**RECORD, "prompt": "1+" * 9}) + "\n")
    return root


def lines(run: Run | subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str]]:
    """Returns state and text by the name of the check."""
    found = re.findall(r"^  (ok|fail|unknown|skipped) +(rollout server \S+|[^:]+): (.*)$", run.stdout, re.MULTILINE)
    assert len({name for _, name, _ in found}) == len(found), run.stdout
    assert run.returncode == (2 if any(state == "fail" for state, _, _ in found) else 0), run.stderr
    return {name: (state, text) for state, name, text in found}


def check(forks: Forks, directory: Path, *arguments: str) -> dict[str, tuple[str, str]]:
    return lines(forks.run("-m", "megatron_rl", "check", *arguments, directory=directory))


def test_a_run_that_can_start_has_a_line_for_each_thing_and_nothing_is_written(forks: Forks, made: Path) -> None:
    before = {path.name for path in made.iterdir()} - {"__pycache__"}
    found = check(forks, made, "run.yaml", "data.heldout=data.jsonl", "rollout.environment.name=guessing")
    assert {state for state, _ in found.values()} == {"ok"}, found
    assert list(found) == [
        "configuration",
        "model.path",
        "engine.device",
        "rollout.servers",
        "objective.custom",
        "data.verifier",
        "rollout.environment.name",
        "data.train",
        "data.heldout",
        "verdict",
        "rollout.environment",
        "run_dir",
    ]
    assert found["data.train"][1] == "1 prompts; the first, 'data.jsonl:1', has 4 tokens"
    assert found["verdict"][1] == "mine:judge gives 0.5, correct, for the reference '2' as response"
    assert {path.name for path in made.iterdir()} - {"__pycache__"} == before


@pytest.fixture
def silent() -> Iterator[str]:
    """URL of a socket that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_all_independent_failures_are_told_within_15_s(made: Path, silent: str) -> None:
    """A process of its own, with all its imports. One server is down, one is silent, one address is of nobody.

    Its seconds of a processor count, as the machine may be busy; servers are asked meanwhile, for 5 s each.
    """
    dead = f"http://127.0.0.1:{free_ports(1)[0]}"
    nobody = "http://192.0.2.1:30000"
    (made / "used").mkdir(exist_ok=True)
    (made / "used" / "model.bin").touch()
    overrides = [
        "run_dir=used",
        "data.heldout=long.jsonl",
        "data.verifier=mine:names",
        "objective.custom=mine:old_loss",
        "rollout.environment.name=chess",
        f"rollout.servers.urls=[{dead},{silent},{nobody}]",
        "rollout.servers.api_key_env=KEY_OF_A_TEST",
    ]
    command = [sys.executable, "-m", "megatron_rl", "check", "run.yaml", *overrides]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "KEY_OF_A_TEST": "a-key", "OMP_NUM_THREADS": "1"}
    found = lines(subprocess.run(command, cwd=made, env=environment, capture_output=True, text=True))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 12
    told = {name: text for name, (state, text) in found.items() if state == "fail"}
    assert told.keys() == {
        "objective.custom",
        "rollout.environment.name",
        "data.heldout",
        "verdict",
        "run_dir",
        *(f"rollout server {url}" for url in (dead, silent, nobody)),
    }
    assert (
        "has the parameters (logprobs, advantages), expected (inputs, config, denominators)" in told["objective.custom"]
    )
    assert "no such environment" in told["rollout.environment.name"]
    assert "long.jsonl:1: prompt: prompt has 18 tokens, expected 1 to data.max_prompt_tokens" in told["data.heldout"]
    assert "expected a Verdict, a number, True or False, got str" in told["verdict"]
    assert "used is not an empty directory" in told["run_dir"]
    assert "ConnectError" in told[f"rollout server {dead}"]
    for url in (dead, silent):
        assert "is it started, and is its URL right?" in told[f"rollout server {url}"]
    assert "no answer within 5 s" in told[f"rollout server {silent}"]
    assert found["rollout.environment"] == ("skipped", "needs rollout.environment.name")
    assert found["data.train"][0] == "ok"


@pytest.mark.parametrize(
    ("overrides", "failed", "text"),
    [
        ("optim.lrr=1 rollout.group_size=x", "configuration", "optim.lrr: no such key"),
        ("data.train=none.jsonl", "data.train", "none.jsonl: no such file or directory"),
        ("data.prompt_field=question", "data.train", "no field 'question'"),
        ("data.chat_template=true", "data.train", "the model's tokenizer has no chat template"),
        ("data.verifier=nowhere:judge", "data.verifier", "No module named 'nowhere'"),
        ("data.verifier=mine:loss", "data.verifier", "found the parameters (inputs, config, denominators), expected"),
        ("objective.custom=mine:lost", "objective.custom", "has no attribute 'lost'"),
        ("engine.device=cuda", "engine.device", "torch sees no CUDA device"),
        ("rollout.replay_from=none data.verifier=null", "rollout.replay_from", "has no rollouts of step 1"),
        ("run_dir=data.jsonl/run", "run_dir", "nothing can be written into "),
        ("rollout.servers.urls=[http://127.0.0.1:9] rollout.servers.api_key_env=UNSET", "", "UNSET is not set"),
    ],
)
def test_each_thing_fails_with_the_error_of_a_start(
    forks: Forks, made: Path, overrides: str, failed: str, text: str
) -> None:
    run = forks.run("-m", "megatron_rl", "check", "run.yaml", *overrides.split(), directory=made)
    if failed == "configuration":
        assert run.returncode == 2
        assert run.stdout.count("  fail     configuration: ") == 2
        assert text in run.stdout
        return
    found = lines(run)
    told = {name: text for name, (state, text) in found.items() if state == "fail"}
    assert list(told) == [failed or "rollout.servers.api_key_env"]
    assert text in next(iter(told.values()))
    if not failed:
        assert found["rollout server http://127.0.0.1:9"] == ("skipped", "needs rollout.servers.api_key_env")


def test_a_layout_of_more_ranks_names_the_option(forks: Forks, made: Path) -> None:
    run = forks.run("-m", "megatron_rl", "check", "run.yaml", "parallel.tp=2", directory=made)
    assert run.returncode == 2
    assert "start a multiple of 2 ranks; --world-size says how many ranks the run will have" in run.stdout


def test_a_damaged_model_leaves_out_what_needs_it(forks: Forks, made: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", num_layers=1)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\0" * 20)
    found = check(forks, made, "run.yaml", f"model.path={tmp_path / 'model'}")
    assert found["model.path"][0] == "fail"
    assert "not a whole safetensors" in found["model.path"][1]
    assert {name for name, (state, _) in found.items() if state == "skipped"} == {"data.train", "verdict"}


def test_a_chat_template_is_shown_as_it_renders_the_first_record(forks: Forks, made: Path, tmp_path: Path) -> None:
    tokenizer = make_chat_tokenizer()
    make_tiny_model(tmp_path / "model", num_layers=1, vocab_size=len(tokenizer))
    for template, state, text in (
        ("<|im_start|>{{ messages[0].content }}", "ok", "'<|im_start|>1+1='"),
        ("{{ raise_exception('no user') }}", "skipped", "needs data.train"),
    ):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / "model")
        found = check(forks, made, "run.yaml", f"model.path={tmp_path / 'model'}", "data.chat_template=true")
        assert found["data.chat_template"] == (state, text)
    assert "the chat template refuses it: no user" in found["data.train"][1]


def test_a_directory_with_a_run_is_told_from_one_with_another(forks: Forks, made: Path, tmp_path: Path) -> None:
    command = ("-m", "megatron_rl", "sft", "sft.yaml", f"run_dir={tmp_path / 'run'}")
    assert forks.run(*command, "steps=2", directory=made).returncode == 0
    found = check(forks, made, "sft.yaml", "--sft", f"run_dir={tmp_path / 'run'}", "steps=3")
    assert found["data.train"] == ("ok", "1 examples")
    assert found["run_dir"] == (
        "ok",
        f"{tmp_path / 'run'} holds a run of this configuration, which --resume goes on with: 2 of 3 steps are made",
    )
    fewer = check(forks, made, "sft.yaml", "--sft", f"run_dir={tmp_path / 'run'}")
    assert fewer["run_dir"] == (
        "fail",
        f"steps: 1, but the run in {tmp_path / 'run'} has made 2 steps; give steps above 2",
    )
    other = check(forks, made, "sft.yaml", "--sft", f"run_dir={tmp_path / 'run'}", "batch_size=2")
    assert other["run_dir"][0] == "fail"
    assert "started with another configuration: batch_size: 64 in the run, 2 now" in other["run_dir"][1]


@pytest.mark.parametrize(
    ("override", "error"),
    [
        (
            "objective.custom=mine:old_loss",
            "objective.custom: 'mine:old_loss' has the parameters (logprobs, advantages)",
        ),
        ("data.verifier=mine:names", "data.verifier: verifier 'mine:names' has no verdict on the response '2', the"),
    ],
)
def test_a_start_finds_mistakes_of_own_code_before_it_starts_servers(
    forks: Forks, made: Path, override: str, error: str
) -> None:
    """The servers could not start: SGLang knows no such flag, and would be waited for."""
    flags = "rollout.servers.extra_flags=[--no-such-flag]"
    done = forks.run("-m", "megatron_rl", "train", "run.yaml", override, flags, directory=made)
    assert done.returncode == 2
    assert f"error: {error}" in done.stderr
    assert not (made / "run").exists()


@pytest.mark.server
def test_a_server_that_does_not_start_is_told_once_and_without_a_traceback(forks: Forks, made: Path) -> None:
    words = ("run.yaml", "objective.custom=null", "rollout.servers.start_timeout=0.1", "run_dir=late")
    run = forks.run("-m", "megatron_rl", "train", *words, directory=made, ranks=2)
    assert run.status == [2, 2], run.stderr
    errors = re.findall(r"^error: .*", run.stderr, re.MULTILINE)
    assert len(errors) == 1, run.stderr
    assert "did not answer within 0.1 s" in errors[0]
    assert "a fault that the program did not expect" not in run.stderr
    assert not (made / "late").exists()


@pytest.mark.server
def test_a_server_that_fits_passes_and_one_that_would_cut_responses_fails(
    forks: Forks, made: Path, tiny_server: Server, tiny_model_dir: Path
) -> None:
    urls = (f"model.path={tiny_model_dir}", f"rollout.servers.urls=[{tiny_server.url}]")
    name = f"rollout server {tiny_server.url}"
    state, text = check(forks, made, "run.yaml", *urls)[name]
    assert state == "ok"
    assert "has the shapes and the vocabulary of" in text
    state, text = check(forks, made, "run.yaml", *urls, "rollout.max_response_tokens=496")[name]
    assert state == "fail"
    assert "start it with --context-length" in text
    state, text = check(forks, made, "run.yaml", urls[1])[name]
    assert state == "fail"
    assert "num_layers 2, not 1" in text
