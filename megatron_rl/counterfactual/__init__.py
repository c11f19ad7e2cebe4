"""Studies of one saved rollout batch without training: what other routings and objectives would have done with it
(replay_study.py), and where the mismatch between rollout engine and trainer comes from (attribution.py)."""
