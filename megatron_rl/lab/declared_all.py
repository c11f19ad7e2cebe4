"""Holds the declaration of all metrics."""

from __future__ import annotations

from megatron_rl.lab.declared import Declaration
from megatron_rl.lab.declared_rollouts import CHECKPOINTS, COSTS, EVALUATIONS, ROLLOUTS
from megatron_rl.lab.declared_routing import ROUTING
from megatron_rl.lab.declared_updates import CRITIC, FINE_TUNING, POLICY

DECLARATION = Declaration((POLICY, ROUTING, CRITIC, ROLLOUTS, COSTS, FINE_TUNING, EVALUATIONS, CHECKPOINTS))
