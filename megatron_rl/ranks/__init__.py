"""Importing this room hides known third-party warnings: every command imports it before it imports Megatron-Core."""

from megatron_rl.ranks.known_warnings import hide_known_records, hide_known_warnings

hide_known_warnings()
hide_known_records()
