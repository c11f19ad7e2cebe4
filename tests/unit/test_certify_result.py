"""When a certificate passes."""

from __future__ import annotations

import pytest

from megatron_rl.certify.result import CertificateResult


@pytest.mark.parametrize(
    ("problems", "caught", "passed"),
    [
        ([], {"rows swapped": True, "layers swapped": True}, True),
        ([], {"rows swapped": True, "layers swapped": False}, False),  # the proof cannot fail, so it proves nothing
        (["a row"], {"rows swapped": True}, False),
    ],
)
def test_a_certificate_needs_every_negative_case_to_be_caught(
    problems: list[str], caught: dict[str, bool], passed: bool
) -> None:
    assert CertificateResult("tp=2", "none", "fp32", 1, 1, 1, 1, problems, caught).passed is passed
