"""The kinds of weights: gradient norms are told by kind, and `freeze` and `graft` are asked for kinds. No torch.

A family's file gives each weight its kind (Weight.kind).
"""

from __future__ import annotations

from typing import Literal, get_args

PolicyKind = Literal["router", "expert", "attention", "embedding", "other"]
"""A kind of a policy's weights. router: the routers; expert: the MLPs of experts; attention: its projections and its
norms of query and key heads, or all of a delta network; embedding: word embeddings and output layer, which may be one
tensor; other: all other norms, and dense MLPs."""

POLICY_KINDS: tuple[PolicyKind, ...] = get_args(PolicyKind)

WeightKind = Literal[PolicyKind, "value_head"]
"""A kind of a policy's or a critic's weights."""

WEIGHT_KINDS: tuple[WeightKind, ...] = get_args(WeightKind)
