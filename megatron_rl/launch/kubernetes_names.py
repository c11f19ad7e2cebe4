"""What Kubernetes takes as a name, an image, a size and a label. Imports no torch.

The rules are those of https://kubernetes.io/docs/concepts/overview/working-with-objects/names and of its API reference;
for images, of https://github.com/distribution/reference. `kubectl apply` would refuse the rest, file by file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?(:\d+)?"
_PART = r"[a-z0-9]+((\.|_{1,2}|-+)[a-z0-9]+)*"
_LABEL_VALUE = r"([A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)"

NOT_BELOW = (PurePosixPath("/dev/shm"), PurePosixPath("/etc/megatron-rl"))
"""Where pods mount their shared memory and their configuration."""


def _of_form(kind: str, pattern: str, expected: str, most: int) -> Callable[[str], str]:
    form = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if len(text) > most or not form.fullmatch(text):
            raise PydanticCustomError(kind, "{expected}", {"expected": expected})
        return text

    return check


def _check_mount(path: PurePosixPath) -> PurePosixPath:
    taken = any(own == path or own in path.parents or path in own.parents for own in NOT_BELOW)
    if not path.is_absolute() or ".." in path.parts or ":" in str(path) or taken:
        raise PydanticCustomError(
            "mount", "an absolute path such as /work, without : and .., that neither holds {taken} nor is in them",
            {"taken": " and ".join(map(str, NOT_BELOW))},
        )  # fmt: skip
    return path


Namespace = Annotated[
    str, AfterValidator(_of_form("namespace", _LABEL, "at most 63 of a-z, 0-9 and -, no - at either end", 63))
]
ObjectName = Annotated[
    str,
    AfterValidator(
        _of_form("name", rf"{_LABEL}(\.{_LABEL})*", "at most 253 of a-z, 0-9, - and ., such as my-claim", 253)
    ),
]
Image = Annotated[
    str,
    AfterValidator(
        _of_form(
            "image",
            rf"({_HOST}/)?{_PART}(/{_PART})*(:\w[\w.-]{{0,127}})?(@[A-Za-z0-9+._-]+:[0-9a-fA-F]{{32,}})?",
            "an image such as registry.example.com/megatron_rl:latest",
            4096,
        )
    ),
]
Size = Annotated[
    str, AfterValidator(_of_form("size", r"[1-9]\d*([KMGTPE]i|[kMGTPE])?", "a size above 0, such as 64Gi", 32))
]
NodeLabel = Annotated[
    str,
    AfterValidator(
        _of_form(
            "label",
            rf"({_LABEL}(\.{_LABEL})*/)?{_LABEL_VALUE}={_LABEL_VALUE}?",
            "a label such as node.kubernetes.io/instance-type=p5.48xlarge",
            253 + 1 + 63 + 1 + 63,
        )
    ),
]
Mount = Annotated[PurePosixPath, AfterValidator(_check_mount)]
