"""Declares the metrics of rollout batches and evaluations, and what a step costs: seconds, traces, weight sync."""

from __future__ import annotations

from megatron_rl.lab.declared import NUMBER, DeclaredMetric, DeclaredTable, Healthy
from megatron_rl.lab.metric_kinds import Kind

SUM, MEAN, TAIL, VALUE = Kind.SUM, Kind.MEAN, Kind.TAIL, Kind.VALUE

NONE_LOST = Healthy(0, 0, "a verifier that works judges every response")

ROLLOUTS = DeclaredTable(
    "Rollouts",
    "metrics.jsonl",
    "rollout/",
    (
        DeclaredMetric("prompts", SUM, "prompt", "Number of prompts sampled for the step."),
        DeclaredMetric("samples", SUM, "response", "Number of responses sampled for the step."),
        DeclaredMetric("tokens", SUM, "token", "Number of generated tokens."),
        DeclaredMetric(
            "reward", TAIL, "1", "Reward by response, after shaping; responses without a verdict are left out."
        ),
        DeclaredMetric("accuracy", MEAN, "fraction of responses", "Fraction of the judged responses that are correct."),
        DeclaredMetric(
            "lost_verdicts",
            SUM,
            "response",
            "Number of responses without a verdict, which no other metric of rewards counts.",
            healthy=NONE_LOST,
        ),
        DeclaredMetric(
            "group/dead",
            MEAN,
            "fraction of groups",
            "Fraction of groups whose rewards are all equal, so that a baseline of the group leaves advantages of 0.",
            "DAPO [2503.14476]",
        ),
        DeclaredMetric(
            "group/dead/{answers}",
            MEAN,
            "fraction of groups",
            "Fraction of all groups whose rewards are all equal and whose answers are all {answers}.",
            fields={"answers": {"all_correct": "correct", "all_wrong": "wrong"}},
        ),
        DeclaredMetric("turns", TAIL, "turn", "Messages of the policy by response; above 1 only with an environment."),
        DeclaredMetric("response_length", TAIL, "token", "Generated tokens by response."),
        DeclaredMetric(
            "response_length/{answers}",
            TAIL,
            "token",
            "Generated tokens by response, of responses judged {answers}.",
            fields={"answers": {"correct": "correct", "wrong": "wrong"}},
        ),
        DeclaredMetric(
            "truncated", MEAN, "fraction of responses", "Fraction of responses that the limit on their length ended."
        ),
        DeclaredMetric(
            "overlong_punishment",
            TAIL,
            "1",
            "Number added to the reward for length, by response; 0 or below.",
            "DAPO [2503.14476, equation 13]",
        ),
        DeclaredMetric(
            "overlong_filtered",
            MEAN,
            "fraction of responses",
            "Fraction of the responses trained on that were masked out because they were truncated.",
            "DAPO [2503.14476, section 3.4]",
        ),
        DeclaredMetric(
            "staleness", TAIL, "weight version", "Weight versions behind the trainer's, by generated token."
        ),
        DeclaredMetric(
            "several_versions",
            MEAN,
            "fraction of responses",
            "Fraction of responses whose tokens several weight versions have generated.",
        ),
        DeclaredMetric(
            "over_sampling/carried_over",
            VALUE,
            "fraction of groups",
            "Fraction of the step's groups that have tokens of older weights than the trainer's.",
        ),
        DeclaredMetric(
            "over_sampling/{what}",
            VALUE,
            "group",
            "Number of {what} when the step had its groups.",
            fields={
                "what": {
                    "left_done": "groups that were done and left to later steps",
                    "left_unfinished": "groups that were still sampled, and left to later steps",
                }
            },
        ),
        DeclaredMetric(
            "dynamic_sampling/{what}",
            VALUE,
            "group",
            "Number of {what} in dynamic sampling.",
            "DAPO [2503.14476, section 3.2]",
            fields={
                "what": {
                    "prompts": "groups sampled",
                    "kept": "groups with right and wrong answers that are trained on",
                    "surplus": "groups with right and wrong answers that are not needed",
                    "all_correct": "groups whose answers are all right",
                    "all_wrong": "groups whose answers are all wrong",
                    "refills": "rounds of prompts after the first",
                }
            },
        ),
    ),
    "They are on the line of a step's first mini-batch, and cover everything that was sampled, groups that dynamic "
    "sampling drops included.",
)

COSTS = DeclaredTable(
    "Costs of a step",
    "metrics.jsonl",
    "",
    (
        DeclaredMetric(
            "time/{phase}",
            VALUE,
            "s",
            "Rank 0's wall-clock seconds of a step's {phase}.",
            fields={
                "phase": {
                    "rollout": "waiting for responses and their verdicts",
                    "schedule": "exchange and packing of samples and routing traces",
                    "old_log-probs": "forward pass of pi_old",
                    "reference_log-probs": "forward pass of pi_ref",
                    "values": "forward pass of the critic",
                    "router_shift": "forward pass that measures the router shift",
                    "update": "optimizer steps of the policy",
                    "critic_update": "optimizer steps of the critic",
                    "weight_sync": "weight sync to the rollout servers",
                    "turns": "moving memory of GPUs between trainer and servers (rollout.servers.colocate)",
                }
            },
        ),
        DeclaredMetric(
            "throughput/tokens_per_second",
            VALUE,
            "token/s",
            "Tokens that the step generated, or that fine-tuning trained on, over the seconds of its phases.",
        ),
        DeclaredMetric(
            "throughput/mfu",
            VALUE,
            "fraction",
            "Model FLOPs of the policy's forward and backward passes in rank 0's replica, over what its GPUs could do "
            "in the seconds of the update; in bf16, on GPUs whose peak is known.",
            "PaLM [2204.02311, appendix B], with experts and attention that a token uses",
        ),
        DeclaredMetric("memory/process", VALUE, "byte", "Resident memory of rank 0's process at the end of the step."),
        DeclaredMetric(
            "memory/gpu", VALUE, "byte", "Largest memory that tensors had on rank 0's GPU since the process began."
        ),
        DeclaredMetric(
            "trace/bytes_moved", VALUE, "byte", "Bytes of routing traces that all ranks received in a step."
        ),
        DeclaredMetric("trace/seconds", VALUE, "s", "Seconds that the slowest rank spent on moving routing traces."),
        DeclaredMetric("weights/servers", VALUE, "1", "Number of rollout servers that got the weight version."),
        DeclaredMetric("weights/bytes", VALUE, "byte", "Bytes of weights that each rollout server got or read."),
        DeclaredMetric(
            "weights/seconds", VALUE, "s", "Rank 0's wall-clock seconds of the weight sync, without its verification."
        ),
        DeclaredMetric(
            "weights/seconds/{phase}",
            VALUE,
            "s",
            "Rank 0's seconds in a phase of the weight sync: {phase}. Phases overlap.",
            fields={
                "phase": {
                    "gather": "gathering of shards, for weights.route collective",
                    "broadcast": "broadcasts; on a GPU the servers' loading has their time",
                    "write": "gathering and writing of files",
                    "load": "the servers' loading of files or broadcasts; on a CPU only what no broadcast overlaps",
                }
            },
        ),
        DeclaredMetric("weights/bytes_per_second", VALUE, "byte/s", "weights/bytes over weights/seconds."),
        DeclaredMetric(
            "weights/checksum",
            VALUE,
            "1",
            "First 48 bits of the first server's checksum over its weights after the sync.",
        ),
        DeclaredMetric(
            "weights/changed",
            VALUE,
            "fraction of elements",
            "Fraction of the weights' elements that differ from the version before, if they alone were sent.",
        ),
        DeclaredMetric(
            "weights/{what}",
            VALUE,
            "nat",
            "{what} of log-probs between trainer and server after a verified weight sync.",
            healthy=Healthy(0, 0.1, "default of weights.verify_bound; 1e-5 if all is fp32 on a CPU"),
            fields={
                "what": {
                    "probe_max_abs_diff": "Largest absolute difference on fixed token ids",
                    "probe_mean_abs_diff": "Mean absolute difference on fixed token ids",
                    "sampled_mean_abs_diff": "Mean absolute difference on tokens that the server sampled",
                }
            },
        ),
    ),
    "They are on the line of a step's last mini-batch.",
)

EVALUATIONS = DeclaredTable(
    "Evaluations",
    "eval.jsonl",
    "",
    (
        DeclaredMetric("prompts", VALUE, "prompt", "Number of held-out prompts."),
        DeclaredMetric("k", VALUE, "response", "Number of responses to each prompt."),
        DeclaredMetric(
            "avg_at_k", VALUE, "fraction of responses", "Fraction of correct responses; a lost verdict counts as wrong."
        ),
        DeclaredMetric(
            "pass_at_{j}",
            VALUE,
            "fraction of prompts",
            "Unbiased estimate of the probability that one of {j} responses is correct.",
            "[2107.03374, equation 1]",
            fields={"j": NUMBER},
        ),
        DeclaredMetric("reward", VALUE, "1", "Mean reward of the judged responses."),
        DeclaredMetric("lost_verdicts", VALUE, "response", "Number of responses without a verdict.", healthy=NONE_LOST),
        DeclaredMetric(
            "truncated", VALUE, "fraction of responses", "Fraction of responses that the limit on their length ended."
        ),
        DeclaredMetric(
            "response_length/{statistic}",
            VALUE,
            "token",
            "{statistic} of the generated tokens by response.",
            fields={"statistic": {"mean": "Mean", "p99": "99th percentile", "max": "Largest number"}},
        ),
        DeclaredMetric("time/evaluation", VALUE, "s", "Wall-clock seconds of the evaluation."),
    ),
    "In TensorBoard they are under `eval/`.",
)

CHECKPOINTS = DeclaredTable(
    "Checkpoints",
    "checkpoints.jsonl",
    "",
    (
        DeclaredMetric(
            "time/checkpoint", VALUE, "s", "Wall-clock seconds in which the checkpoint kept the run waiting."
        ),
        DeclaredMetric(
            "time/checkpoint_write",
            VALUE,
            "s",
            "Wall-clock seconds in which the checkpoint was copied and written, beside the run.",
        ),
    ),
)
