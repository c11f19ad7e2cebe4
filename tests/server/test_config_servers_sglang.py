"""Flags that the trainer sets itself, compared with the flags that SGLang knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from megatron_rl.config.server_flags import TRAINERS_FLAGS, UNROUTED_FLAGS, WHOLE_FLAGS

OPTIONS_OF_SGLANG = """
import argparse, json, sys
from megatron_rl.rollout import sglang_cpu
sglang_cpu.install_stand_ins()
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
print(json.dumps(sorted(parser._option_string_actions)))
"""


@pytest.mark.slow
@pytest.mark.server
def test_sglang_knows_the_flags_that_the_trainer_sets() -> None:
    """SGLang knows all of them but the abbreviation `--tp`. WHOLE_FLAGS lists its flags that are prefixes of ours."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SGLANG_USE_CPU_ENGINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", OPTIONS_OF_SGLANG], env=environment, capture_output=True, text=True, check=True
    )
    known = set(json.loads(done.stdout.splitlines()[-1]))
    flags = {*TRAINERS_FLAGS, *UNROUTED_FLAGS}
    assert flags - known == {"--tp"}
    begun = {k for k in known for flag in flags if flag.startswith(k) and k != flag and k not in flags}
    assert begun == WHOLE_FLAGS
