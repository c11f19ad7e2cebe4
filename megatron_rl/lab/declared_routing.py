"""Declares the routing metrics, which routing/drift.py computes by layer and optimizer step."""

from __future__ import annotations

from megatron_rl.lab.declared import DeclaredMetric, DeclaredTable
from megatron_rl.lab.metric_kinds import Kind

LAYERS, VALUE = Kind.LAYERS, Kind.VALUE

PAIRS = {
    "rollout_old/effective": "mu and pi_old, as used",
    "rollout_old/live": "mu and pi_old, as pi_old's routers would choose",
    "old_policy/effective": "pi_old and pi_theta, as used",
    "old_policy/live": "pi_old and pi_theta, as pi_theta's routers would choose",
    "rerun": "two passes of pi_old, the noise floor",
}

ROUTING = DeclaredTable(
    "Routing",
    "metrics.jsonl",
    "routing/",
    (
        DeclaredMetric("entropy", LAYERS, "nat", "Mean entropy of the router's softmax over all experts, by row."),
        DeclaredMetric(
            "margin", LAYERS, "1", "Mean difference of the K-th and the (K+1)-th largest score of the router."
        ),
        DeclaredMetric(
            "mass",
            LAYERS,
            "fraction",
            "Mean share of the router's softmax over all experts that is on the experts used.",
        ),
        DeclaredMetric(
            "live_overlap",
            LAYERS,
            "fraction",
            "Mean share of the replayed experts that the router would have chosen itself.",
        ),
        DeclaredMetric(
            "fallback", LAYERS, "fraction of rows", "Fraction of rows without a route to replay, which route live."
        ),
        DeclaredMetric(
            "max_vio",
            LAYERS,
            "1",
            "Largest load of an expert above the mean load, divided by the mean load.",
            "loss-free balancing [2408.15664]",
        ),
        DeclaredMetric(
            "load_cv",
            LAYERS,
            "1",
            "Standard deviation of the experts' loads, divided by their mean.",
            "MiMo-V2.6 [2610.11959]",
        ),
        DeclaredMetric("dead_experts", LAYERS, "expert", "Number of experts that no row of the optimizer step used."),
        DeclaredMetric(
            "cold_experts",
            LAYERS,
            "fraction of experts",
            "Fraction of experts with less than a tenth of the mean load.",
            "MiMo-V2.6 [2610.11959]",
        ),
        DeclaredMetric(
            "ep_peak",
            LAYERS,
            "1",
            "Load of the fullest expert-parallel rank in the worst micro-batch, divided by the mean of its ranks; only "
            "under expert parallelism.",
        ),
        DeclaredMetric(
            "set_mismatch/{pair}",
            LAYERS,
            "fraction of rows",
            "Fraction of rows whose sets of experts differ between {pair}.",
            "R3 [2510.11370] reports about 10% of routers for mu and pi_old",
            fields={"pair": PAIRS},
        ),
        DeclaredMetric(
            "expert_change/{pair}",
            LAYERS,
            "fraction of experts",
            "Mean of 1 - |E n E'|/K, the share of a row's experts that differ between {pair}.",
            "GSPO [2507.18071, section 5.3] reports about 10% after one gradient update, with 48 layers",
            fields={"pair": PAIRS},
        ),
        DeclaredMetric(
            "top1_change/{pair}",
            LAYERS,
            "fraction of rows",
            "Fraction of rows whose expert with the largest score differs between {pair}.",
            fields={"pair": PAIRS},
        ),
        DeclaredMetric(
            "token_layers/{pair}/mean",
            VALUE,
            "layer",
            "Mean number of layers in which a token's sets of experts differ between {pair}.",
            fields={"pair": PAIRS},
        ),
        DeclaredMetric(
            "token_layers/{pair}/any",
            VALUE,
            "fraction of tokens",
            "Fraction of tokens with at least one layer whose sets of experts differ between {pair}.",
            "R3 [2510.11370] reports 94% for mu and pi_old",
            fields={"pair": PAIRS},
        ),
    ),
    "Rows are tokens without padding; E and E' are the sets of K experts that a row has in a layer. Effective experts "
    "are the experts used; live ones are the router's own choice. A dense model has no routing metrics.",
)
