"""Environments of a user's, which tests name as `turn_environments:Class`."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from typing import Any, ClassVar

from megatron_rl.data.sample import Prompt, Verdict

Result = tuple[list[dict[str, Any]], Any, bool]


class Adding:
    """Answers with what it was told and how often, until it was told `turns` times."""

    turns = 3

    def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
        self.told: list[str] = []
        return [{"role": "user", "content": prompt.text}]

    def step(self, message: dict[str, Any]) -> Result:
        self.told.append(message["content"])
        if len(self.told) == self.turns:
            return [], Verdict(float(len("".join(self.told))), True), True
        return [{"role": "user", "content": f"+{len(self.told)} {message['content'][-4:]}"}], None, False


class Failing(Adding):
    """Does at its second step what the prompt says."""

    tools: ClassVar[list[dict[str, Any]]] = [{"type": "function", "function": {"name": "fail"}}]

    def step(self, message: dict[str, Any]) -> Result:
        answer = super().step(message)
        if len(self.told) < 2:
            return answer
        if self.how == "hang":
            subprocess.Popen(["sleep", "600"])
            while True:
                time.sleep(1)
        if self.how == "crash":
            ctypes.string_at(0)
        if self.how == "raise":
            raise RuntimeError("the tool is broken")
        if self.how == "exit":
            raise SystemExit(3)
        return ([], 1.0, True) if self.how == "end" else (None, None, False)  # type: ignore[return-value]

    def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
        self.how = prompt.answer
        print("a print is no answer")
        return super().reset(prompt)


class Closed(Adding):
    def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
        raise FileNotFoundError("no such game")


class Moody(Adding):
    """Opens conversations on one prompt in different ways."""

    def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
        super().reset(prompt)
        return [{"role": "user", "content": f"{prompt.text}{os.getpid()}"}]


class WithoutStep:
    def reset(self, prompt: Prompt) -> list[dict[str, Any]]:
        return []


def no_class() -> None: ...
