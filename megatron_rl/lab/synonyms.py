"""What TRL, verl and slime call the metrics, for those who come from there. tools/write_metrics.py writes the table.

Read in their sources: TRL f2cd577 (trl/trainer/grpo_trainer.py, and transformers' Trainer for loss, grad_norm and
learning_rate), verl b178a3c (verl/workers, and metric_utils.py, core_algos.py, rollout_corr_helper.py and
ray_trainer.py of verl/trainer/ppo), slime 624b824 (slime/observability and slime/backends/megatron_utils/loss.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Synonym:
    name: str
    """As in a line of `file`."""
    trl: str = ""
    verl: str = ""
    slime: str = ""
    note: str = ""
    """How theirs differs, if it does."""
    file: str = "metrics.jsonl"


SYNONYMS = (
    Synonym(
        "rollout/reward/mean", "reward", "critic/score/mean", "rollout/raw_reward", "before shaping in verl and slime"
    ),
    Synonym("rollout/reward/std", "reward_std"),
    Synonym("rollout/group/dead", "frac_reward_zero_std", "", "rollout/zero_std/count_*", "a count by reward in slime"),
    Synonym(
        "rollout/response_length/mean", "completions/mean_length", "response_length/mean", "rollout/response_len/mean"
    ),
    Synonym("rollout/response_length/max", "completions/max_length", "response_length/max", "rollout/response_len/max"),
    Synonym("rollout/response_length/min", "completions/min_length", "response_length/min", "rollout/response_len/min"),
    Synonym("rollout/truncated", "completions/clipped_ratio", "response_length/clip_ratio", "rollout/truncated_ratio"),
    Synonym("rollout/turns/mean", "", "num_turns/mean"),
    Synonym("loss", "loss", "actor/pg_loss", "train/loss", "without the KL's and the entropy's terms in verl"),
    Synonym("entropy/mean", "entropy", "actor/entropy", "train/entropy_loss"),
    Synonym("advantage/mean", "", "critic/advantages/mean", "rollout/advantages", "by token in verl"),
    Synonym("grad_norm", "grad_norm", "actor/grad_norm", "train/grad_norm"),
    Synonym("lr", "learning_rate", "actor/lr", "train/lr-pg_*"),
    Synonym(
        "clip/low/active/token",
        "clip_ratio/low_mean",
        "actor/pg_clipfrac",
        "train/pg_clipfrac",
        "both sides together in verl and slime",
    ),
    Synonym(
        "clip/high/active/token",
        "clip_ratio/high_mean",
        "actor/pg_clipfrac",
        "train/pg_clipfrac",
        "both sides together in verl and slime",
    ),
    Synonym("clip/dual/token", "", "actor/pg_clipfrac_lower"),
    Synonym("kl/old_policy/k1", "", "actor/ppo_kl", "train/ppo_kl"),
    Synonym(
        "kl/policy_reference/k3",
        "kl",
        "actor/kl_loss",
        "train/kl_loss",
        "of the estimator that is configured in verl and slime",
    ),
    Synonym("kl/rollout_old/k1", "", "rollout_corr/kl"),
    Synonym("kl/rollout_old/k3", "", "rollout_corr/k3_kl"),
    Synonym(
        "abs_logprob_gap/mean", "sampling/sampling_logp_difference/mean", "", "train/train_rollout_logprob_abs_diff"
    ),
    Synonym("abs_logprob_gap/max", "sampling/sampling_logp_difference/max"),
    Synonym("rho/mean", "", "", "train/tis"),
    Synonym("rho/chi2", "", "rollout_corr/chi2_token"),
    Synonym("log_perplexity_gap/mean", "", "rollout_corr/log_ppl_diff"),
    Synonym("correction/truncated/token", "", "", "train/tis_clipfrac"),
    Synonym("critic/loss", "", "critic/vf_loss"),
    Synonym("critic/value/mean", "", "critic/values/mean"),
    Synonym("critic/return/mean", "", "critic/returns/mean"),
    Synonym("critic/explained_variance", "", "critic/vf_explained_var"),
    Synonym("critic/clipped", "", "critic/vf_clipfrac"),
    Synonym("critic/grad_norm", "", "critic/grad_norm"),
    Synonym("critic/lr", "", "critic/lr"),
    Synonym("time/rollout", "", "timing_s/gen", "perf/rollout_time", "without verdicts in verl"),
    Synonym("time/old_log-probs", "", "timing_s/old_log_prob", "perf/log_probs_time"),
    Synonym("time/reference_log-probs", "", "", "perf/ref_log_probs_time"),
    Synonym("time/values", "", "timing_s/values"),
    Synonym("time/update", "", "timing_s/update_actor", "perf/actor_train_time"),
    Synonym("time/critic_update", "", "timing_s/update_critic"),
    Synonym("time/weight_sync", "", "timing_s/update_weights", "perf/update_weights_time"),
    Synonym(
        "throughput/tokens_per_second",
        "",
        "perf/throughput",
        "perf/tokens_per_gpu_per_sec",
        "by GPU in verl and slime; with prompts in verl, over the rollout's seconds in slime",
    ),
    Synonym("throughput/mfu", "", "perf/mfu/actor"),
    Synonym("memory/gpu", "", "perf/max_memory_allocated_gb", "", "in GiB in verl"),
    Synonym("avg_at_k", "", "val-core/*/acc/mean@*", "eval/*", file="eval.jsonl"),
    Synonym("truncated", "", "", "eval/*-truncated_ratio", file="eval.jsonl"),
)
