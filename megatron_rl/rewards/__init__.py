"""Judges a rollout's groups by verifiers, which are functions (prompt, response text) -> Verdict."""

from __future__ import annotations

from megatron_rl.rewards.grading import grade
from megatron_rl.rewards.judges import Judges, check_verifier
from megatron_rl.rewards.verifiers import RewardError, Verifier, get_verifier

__all__ = ["Judges", "RewardError", "Verifier", "check_verifier", "get_verifier", "grade"]
