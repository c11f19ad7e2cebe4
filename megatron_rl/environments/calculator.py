"""A tool that computes, and a conversation that ends with the message that does not use it.

The policy calls the tool `calculator` in the form of its chat template. In plain text it ends a message with `=`: the
expression before it is computed, and the result comes back.
"""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, ClassVar

from megatron_rl.data.sample import Prompt, Verdict
from megatron_rl.environments.env import Message

_LONGEST = 200
_LARGEST = 10**30
_PLAIN = re.compile(r"([-+*/(). 0-9]+)=\s*\Z")
_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Calculator:
    """The prompt's verifier judges the last message."""

    tools: ClassVar[list[dict[str, Any]]] = [
        {
            "type": "function",
            "function": {
                "name": "calculator",
                "description": "Computes an expression of numbers, + - * / and parentheses.",
                "parameters": {
                    "type": "object",
                    "properties": {"expression": {"type": "string", "description": "such as (3 + 5) * 2"}},
                    "required": ["expression"],
                },
            },
        }
    ]

    def reset(self, prompt: Prompt) -> list[Message]:
        return [{"role": "user", "content": prompt.text}]

    def step(self, message: Message) -> tuple[list[Message], Verdict | float | None, bool]:
        asked = _calls(message)
        if not asked and (plain := _PLAIN.search(message["content"])):
            asked = [plain[1]]
        return [{"role": "tool", "name": "calculator", "content": compute(each)} for each in asked], None, not asked


def _calls(message: Message) -> list[str]:
    found = []
    for call in message.get("tool_calls", ()):
        arguments = call["function"]["arguments"]
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                arguments = {}
        expression = arguments.get("expression") if isinstance(arguments, dict) else None
        found.append(expression if isinstance(expression, str) else "")
    return found


def compute(expression: str) -> str:
    """The exact value, as a whole number, a decimal or a fraction; `error` for all else, such as a division by 0."""
    try:
        if len(expression) > _LONGEST:
            return "error"
        # Zeros before a number are no Python.
        tree = ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", expression.strip()), mode="eval")
        return _written(_value(tree.body))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return "error"


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        value = Fraction(str(node.value))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.operand))
    else:
        raise ValueError(node)
    if max(abs(value.numerator), value.denominator) > _LARGEST:
        raise ValueError(value)
    return value


def _written(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    decimal = repr(float(value))
    return decimal if Fraction(decimal) == value else f"{value.numerator}/{value.denominator}"
