"""Reads each file of this folder as what its name says, and prints how it is refused.

Each of them was once a traceback, took for ever, or was accepted though it is damaged.
"""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from tiny_models import make_tokenizer

from megatron_rl.config.load import load_config
from megatron_rl.config.schema import Config
from megatron_rl.data.prompts import Fields
from megatron_rl.data.store import read_groups
from megatron_rl.engine.checkpoint import read_manifest
from megatron_rl.errors import UserError
from megatron_rl.models.architecture import read_architecture
from megatron_rl.rewards.checked_prompts import load_prompts
from megatron_rl.rollout.answers import read_completion


def config(file: Path) -> None:
    case = json.loads(file.read_text())
    path = Path("config.yaml")
    path.write_text(case["yaml"].replace("DIR/model", "MODEL").replace("DIR", "."))
    load_config(Config, path, case["overrides"])


def config_text(file: Path) -> None:
    load_config(Config, file)


def answer(file: Path) -> None:
    case = json.loads(file.read_text())
    read_completion(
        case["answer"],
        where="server",
        prompt_tokens=case["prompt_tokens"],
        max_new_tokens=len(case["answer"]["output_ids"]),
        vocab_size=45,
        versions=range(8),
    )


def data(file: Path) -> None:
    content = file.read_bytes()
    source = content.decode() if content.startswith(b"arithmetic:") else "data.jsonl"
    Path("data.jsonl").write_bytes(content)
    load_prompts(source, Fields("prompt", "answer"), make_tokenizer(), 99)


def manifest(file: Path) -> None:
    directory = Path("step-000002")
    directory.mkdir(exist_ok=True)
    shutil.copy(file, directory / "manifest.json")
    read_manifest(directory)


def model_config(file: Path) -> None:
    model = Path("another")
    model.mkdir(exist_ok=True)
    shutil.copy(file, model / "config.json")
    read_architecture(model)


def store(file: Path) -> None:
    list(read_groups(file))


KINDS: dict[str, Callable[[Path], None]] = {
    "config": config,
    "bomb": config_text,
    "deep": config_text,
    "selfpreset": config_text,
    "answer": answer,
    "data": data,
    "manifest": manifest,
    "model-config": model_config,
    "store": store,
}

for file in sorted(Path().iterdir()):
    kind = next((kind for kind in sorted(KINDS, key=len, reverse=True) if file.name.startswith(kind)), None)
    if kind is None or file.name in ("config.yaml", "data.jsonl"):
        continue
    try:
        KINDS[kind](file)
        print(f"{file.name}: ACCEPTED")
    except UserError as error:
        print(f"{file.name}: refused: {str(error).splitlines()[0]:.160}")
    except (OSError, ValueError) as error:
        print(f"{file.name}: {type(error).__name__}: {error!s:.160}")
    except Exception as error:
        print(f"{file.name}: OTHER {type(error).__name__}: {error!s:.160}")
    sys.stdout.flush()
