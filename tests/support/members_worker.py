"""Ranks that sync weights to two servers, one of which fails, stays silent, differs and comes back:

members_worker.py MODEL URL LAYOUT DIRECTORY
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from fault_proxy import Fault, FaultProxy
from sync_worker import policy_of

from megatron_rl.config.schema import WeightsConfig


def differs(answer: Any) -> None:
    """Changes the log-probs of tokens that the server has scored."""
    for entry in answer["meta_info"].get("input_token_logprobs", []) if isinstance(answer, dict) else []:
        entry[0] = entry[0] and entry[0] - 1.0


CASES = {
    "both": Fault(),
    "refuses": Fault(status=400),
    "is silent": Fault(drop=True),
    "differs": Fault(change=lambda answer: differs(answer) if "meta_info" in answer else None),
    "is back": Fault(),
}


def main(model: str, url: str, layout: str, directory: str) -> None:
    from megatron_rl.errors import UserError
    from megatron_rl.rollout.background import BackgroundLoop
    from megatron_rl.rollout.source import Leader
    from megatron_rl.weights.sync import WeightSync

    policy = policy_of(model, layout)
    config = WeightsConfig(route="disk")
    leader = proxies = None
    if policy.place.rank == 0:
        loop = BackgroundLoop()
        proxies = [FaultProxy(url), FaultProxy(url)]
        for proxy in proxies:
            loop.run(proxy.__aenter__())
        leader = Leader([proxy.url for proxy in proxies], api_key=None, deadline=60.0)
    sync = WeightSync(config, policy, leader, Path(directory), temperature=1.0, seed=0)
    for version, (case, fault) in enumerate(CASES.items(), start=7):
        if leader is not None and proxies is not None:
            odd = proxies[1]
            newcomers = [odd.url] if case in ("differs", "is back") else []
            sync.use([leader.client(proxy.url) for proxy in proxies], newcomers)
            odd.faults = [fault] if case == "refuses" else []
            odd.always = fault
        report = sync.push(version) | sync.verify_if_due(version)
        if proxies is not None:
            print(
                json.dumps(
                    {
                        "case": case,
                        "used": [proxy.url in sync.urls for proxy in proxies],
                        "pushed": report["weights/servers"],
                        "verified": "weights/probe_max_abs_diff" in report,
                        "why": sync.lost.get(proxies[1].url, "").partition("{")[0],
                    }
                ),
                flush=True,
            )
    if proxies is not None:
        for proxy in proxies:
            proxy.always = Fault(status=400)
    try:
        sync.push(20)
    except UserError as error:
        print(json.dumps({"case": "all", "rank": policy.place.rank, "why": str(error).partition("{")[0]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
