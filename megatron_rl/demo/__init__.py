"""The demo that `megatron-rl demo` runs: its configurations, its model, and a control of its rewards."""
