"""What the operators of a mixture of experts refuse on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vexact.ops import ExpertGroups, combine, group_tokens, grouped_linear, route

ZEROS, INT = torch.zeros, torch.int32
LOGITS = ZEROS(3, 8)
GROUPS = group_tokens(torch.tensor([[0, 1], [1, 3], [0, 3]], dtype=INT), 4)
STRIDED = ExpertGroups(GROUPS.rows, GROUPS.slots.T.contiguous().T, GROUPS.offsets)


def routed(logits: Any = LOGITS, bias: Any = None, **changed: Any) -> Any:
    return route(logits, bias, **{"top_k": 2} | changed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: routed(ZEROS(3, 8).bfloat16()), "logits are torch.bfloat16; they must stay fp32"),
        (lambda: routed(ZEROS(8)), r"logits is \(8,\), expected \(T, E\)"),
        (lambda: routed(top_k=0), r"top_k=0 is outside 1 \.\.\. 8"),
        (lambda: routed(top_k=9), r"top_k=9 is outside 1 \.\.\. 8"),
        (lambda: routed(top_k=5, num_groups=4, top_groups=2), r"top_k=5 is outside 1 \.\.\. 4"),
        (lambda: routed(scoring="softplus"), "unknown scoring 'softplus'; use one of softmax, sigmoid"),
        (lambda: routed(num_groups=3), "num_groups=3 does not divide 8 experts"),
        (lambda: routed(num_groups=0), "num_groups=0 does not divide"),
        (lambda: routed(num_groups=4, top_groups=5), r"top_groups=5 is outside 1 \.\.\. num_groups=4"),
        (lambda: routed(num_groups=8, top_groups=4, scoring="sigmoid"), "8 groups of one expert"),
        (lambda: routed(bias=ZEROS(7)), r"bias is \(7,\), expected \(8,\)"),
        (lambda: routed(bias=ZEROS(8).half()), "bias is torch.float16, expected torch.float32"),
        (lambda: routed(digest=ZEROS(3).int()), "digest is torch.int32, expected torch.int64"),
        (lambda: routed(digest=ZEROS(2).long()), r"digest is \(2,\), expected \(3,\)"),
        (lambda: routed(digest=ZEROS(6).long()[::2]), r"digest has strides \(2,\); it must be contiguous"),
        (lambda: routed(digest=ZEROS(3, device="meta").long()), "logits are on cpu but digest is on meta"),
        (lambda: routed(scale=math.nan), "scale is nan; it must be finite"),
        (lambda: routed(scale=-math.inf), "scale is -inf; it must be finite"),
        (lambda: routed(round_to=torch.int8), "round_to is torch.int8; use fp32, bf16 or fp16"),
        (lambda: routed(salt=-1), "salt is -1; use the index of the layer"),
        (lambda: group_tokens(ZEROS(3, 2), 4), "experts are torch.float32, expected torch.int32"),
        (lambda: group_tokens(ZEROS(3, dtype=INT), 4), r"experts is \(3,\), expected \(T, k\)"),
        (lambda: group_tokens(ZEROS(3, 2, dtype=INT), 0), "num_experts=0"),
        (lambda: group_tokens(torch.tensor([[0, -1], [4, 5]], dtype=INT), 4), r"experts holds 4, .* 0 \.\.\. 3"),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 7), GROUPS, gather=True), r"K=8 but weight is \(4, 5, 7\)"),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(5, 8), GROUPS, gather=True), r"expected \(E, N, K\)"),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 8).half(), GROUPS, gather=True), "cast one of them"),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(6, 5, 8), GROUPS, gather=True), "6 experts but .* for 4"),
        (lambda: grouped_linear(ZEROS(6, 8), ZEROS(4, 5, 8), GROUPS, gather=True), "6 rows but there are 3 tokens"),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 8), GROUPS, gather=False), "3 rows but there are 6 places"),
        (
            lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 8), GROUPS._replace(rows=GROUPS.rows.long()), gather=True),
            "rows is torch.int64, expected torch.int32",
        ),
        (
            lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 8), GROUPS._replace(rows=GROUPS.rows[:4]), gather=True),
            r"4 rows but slots is \(3, 2\)",
        ),
        (lambda: grouped_linear(ZEROS(3, 8), ZEROS(4, 5, 8), STRIDED, gather=True), "slots has strides"),
        (lambda: combine(ZEROS(5, 8), ZEROS(3, 2), GROUPS), "y has 5 rows but there are 6 places"),
        (lambda: combine(ZEROS(6, 8), ZEROS(3, 1), GROUPS), r"weights is \(3, 1\), expected \(3, 2\)"),
        (lambda: combine(ZEROS(6, 8), ZEROS(3, 2).half(), GROUPS), "weights are torch.float16, expected torch.float32"),
        (lambda: combine(ZEROS(6, 8), ZEROS(3, 2), GROUPS, ZEROS(3, 7)), r"shared is \(3, 7\), expected \(3, 8\)"),
        (lambda: combine(ZEROS(6, 8), ZEROS(3, 2), GROUPS, ZEROS(3, 8).half()), "cast one of them"),
        (lambda: combine(ZEROS(6, 8).double(), ZEROS(3, 2), GROUPS), "y is torch.float64; use fp32"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
