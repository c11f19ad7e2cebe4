"""The JSON schema of a JobSet."""

from __future__ import annotations

from typing import Any

# What https://github.com/kubernetes-sigs/jobset says in api/jobset/v1alpha2/jobset_types.go, of the fields that are
# used. The template of a job is batch/v1's, which has a schema of its own.
NAMED = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts", "RestartJob")
RULE_NAME = "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


RULE = strict(
    {
        "name": {"type": "string", "pattern": RULE_NAME},
        "action": {"enum": list(ACTIONS)},
        "onJobFailureReasons": NAMED,
        "onJobFailureMessagePatterns": NAMED,
        "targetReplicatedJobs": NAMED,
    },
    "name",
    "action",
)
FAILURE_POLICY = strict(
    {
        "maxRestarts": {"type": "integer"},
        "restartStrategy": {"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
        "rules": {"type": "array", "items": RULE},
    }
)
NETWORK = strict(
    {
        "enableDNSHostnames": {"type": "boolean"},
        "publishNotReadyAddresses": {"type": "boolean"},
        "subdomain": {"type": "string"},
    }
)
REPLICATED = strict(
    {
        "name": {"type": "string"},
        "replicas": {"type": "integer"},
        "template": strict({"metadata": {"type": "object"}, "spec": {"type": "object"}}, "spec"),
    },
    "name",
    "template",
)
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": strict(
            {
                "network": NETWORK,
                "failurePolicy": FAILURE_POLICY,
                "replicatedJobs": {"type": "array", "items": REPLICATED},
            }
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)
