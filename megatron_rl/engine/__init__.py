"""Importing this room imports Megatron-Core, before one of its modules would do it in twice the time."""

import megatron_rl.ranks.megatron  # noqa: F401
