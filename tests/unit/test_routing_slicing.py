"""A rank's part of routing traces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_rl.data.trace import RoutingTrace
from megatron_rl.data.versions import VersionSpan
from megatron_rl.routing.slicing import RouteOwner, ids_dtype, slice_routes


@pytest.mark.parametrize(("experts", "dtype"), [(256, torch.uint8), (257, torch.int16), (384, torch.int16)])
def test_ids_of_the_last_experts_are_kept(experts: int, dtype: torch.dtype) -> None:
    ids = np.array([[[experts - 1, 0]], [[1, experts - 2]]])
    spans = (VersionSpan(0, 0, 2),)
    trace = RoutingTrace.from_ids(ids, layers=(3,), num_experts=experts, source="rollout", versions=spans)
    routes = slice_routes([trace], np.array([0, 2]), RouteOwner(tp=0, cp=0, layers=(3,)), tp=1, cp=1)
    assert routes.experts.dtype == ids_dtype(experts) == dtype
    assert routes.experts.long().tolist() == ids.tolist()
    assert routes.present.tolist() == [True, True]
