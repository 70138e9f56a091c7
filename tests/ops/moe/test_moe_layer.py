"""A whole layer: the bits of a token in any company, its gradients against fp64, compiled, and on stock operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vexact.models.opset import OpSet, op_set
from vexact.ops.moe.combine import combine_reference
from vexact.ops.moe.digest import digest_of
from vexact.ops.moe.grouped_linear import grouped_linear_reference
from vexact.ops.moe.groups import group_tokens_reference
from vexact.ops.moe.route import route_reference
from vexact.ops.swiglu import swiglu_reference

EXPERTS, HIDDEN, WIDTH = 16, 24, 20
QWEN = {"top_k": 4}
DEEPSEEK = {"top_k": 4, "scoring": "sigmoid", "num_groups": 4, "top_groups": 2, "scale": 2.5}


def weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {
        "router": (EXPERTS, HIDDEN),
        "gate_up": (EXPERTS, 2 * WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
        "shared": (HIDDEN, HIDDEN),
    }
    return {name: (torch.randn(shape) * 0.3).to(dtype).requires_grad_() for name, shape in shapes.items()}


BIAS = torch.linspace(-0.1, 0.1, EXPERTS)


def layer(ops: OpSet, w: dict[str, Tensor], x: Tensor, digest: Tensor | None, settings: dict[str, Any]) -> Tensor:
    logits = ops.linear(x, w["router"], out_dtype=torch.float32)
    routes = ops.route(logits, BIAS, round_to=x.dtype, digest=digest, salt=3, **settings)
    groups = ops.group_tokens(routes.experts, EXPERTS)
    inner = ops.swiglu(ops.grouped_linear(x, w["gate_up"], groups, gather=True))
    out: Tensor = ops.combine(
        ops.grouped_linear(inner, w["down"], groups, gather=False), routes.weights, groups, ops.linear(x, w["shared"])
    )
    return out


Layer = Callable[[OpSet, dict[str, Tensor], Tensor, Tensor | None, dict[str, Any]], Tensor]


def run(call: Layer, ops: OpSet, w: dict[str, Tensor], x: Tensor, settings: dict[str, Any]) -> list[Tensor]:
    """Output, digest, gradient of x, gradients of the weights."""
    digest, leaf = torch.zeros(len(x), dtype=torch.int64), x.clone().requires_grad_()
    out = call(ops, w, leaf, digest, settings)
    grads = torch.autograd.grad((out.float() * torch.linspace(-1, 1, HIDDEN)).sum(), (leaf, *w.values()))
    return [out.detach(), digest, *grads]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [QWEN, DEEPSEEK], ids=["qwen", "deepseek"])
def test_a_token_has_one_result_one_route_and_one_gradient(settings: dict[str, Any], dtype: torch.dtype) -> None:
    w, ops = weights(dtype), op_set()
    x = torch.randn(130, HIDDEN).to(dtype)
    whole = run(layer, ops, w, x, settings)[:3]
    assert whole[1].unique().numel() > 50
    alone = [run(layer, ops, w, row, settings)[:3] for row in x.split(1)]
    assert all(torch.equal(torch.cat(parts), all_) for parts, all_ in zip(zip(*alone, strict=True), whole, strict=True))
    order = torch.randperm(130)
    for subset in (slice(0, 40), slice(17, 130), order):
        part = run(layer, ops, w, x[subset], settings)[:3]
        assert all(torch.equal(a, b[subset]) for a, b in zip(part, whole, strict=True))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(layer, ops, w, x, settings)[:3], whole, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("settings", [QWEN, DEEPSEEK, {**QWEN, "normalize": False}], ids=["qwen", "deepseek", "plain"])
def test_all_gradients_are_those_of_fp64(settings: dict[str, Any]) -> None:
    w, x = weights(), torch.randn(60, HIDDEN)
    ours = run(layer, op_set(), w, x, settings)
    wide = {name: tensor.detach().double().requires_grad_() for name, tensor in w.items()}
    leaf = x.double().requires_grad_()
    routes = route_reference(leaf @ wide["router"].T, BIAS, **settings)
    groups = group_tokens_reference(routes.experts, EXPERTS)
    inner = swiglu_reference(grouped_linear_reference(leaf, wide["gate_up"], groups, gather=True))
    down = grouped_linear_reference(inner, wide["down"], groups, gather=False)
    out = combine_reference(down, routes.weights, groups, leaf @ wide["shared"].T)
    grads = torch.autograd.grad((out * torch.linspace(-1, 1, HIDDEN)).sum(), (leaf, *wide.values()))
    for mine, exact in zip([ours[0], *ours[2:]], [out.detach(), *grads], strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("settings", [QWEN, DEEPSEEK], ids=["qwen", "deepseek"])
def test_stock_operators_compute_the_same_layer(settings: dict[str, Any]) -> None:
    w, x = weights(), torch.randn(60, HIDDEN)
    for ours, theirs in zip(run(layer, op_set(), w, x, settings), run(layer, op_set("stock"), w, x, settings)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_has_the_bits_of_eager_for_all_batch_sizes() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    w, ops = weights(), op_set()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (37, 5, 64):
        x = torch.randn(tokens, HIDDEN)
        results = [run(call, ops, w, x, DEEPSEEK) for call in (layer, compiled)]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert results[1][1].any(), "the digest is filled in place"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [QWEN, DEEPSEEK], ids=["qwen", "deepseek"])
def test_a_layer_on_a_gpu(settings: dict[str, Any]) -> None:
    """A token alone and in company; close to stock operators, which run torch's grouped product; padding among them."""
    torch.manual_seed(0)
    shapes = (16, 64), (16, 96, 64), (16, 64, 48)
    router, gate_up, down = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 0.3 for shape in shapes)

    def routed(ops: OpSet, x: Tensor, digest: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        logits = ops.linear(x, router, out_dtype=torch.float32)
        routes = ops.route(logits, round_to=x.dtype, digest=digest, salt=7, **settings)
        experts = routes.experts.masked_fill(torch.arange(len(x), device="cuda").unsqueeze(1) % 3 == 0, -1)
        groups = ops.group_tokens(experts if padded else routes.experts, 16)
        inner = ops.swiglu(ops.grouped_linear(x, gate_up, groups, gather=True))
        out = ops.combine(ops.grouped_linear(inner, down, groups, gather=False), routes.weights, groups)
        return out, routes.experts

    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    digest, again = torch.zeros(2, 300, dtype=torch.int64, device="cuda")
    out, experts = routed(op_set(), x, digest, padded=False)
    assert torch.equal(digest.cpu(), digest_of(experts.cpu(), 7))
    for part in (slice(0, 1), slice(5, 40), slice(200, 300)):
        assert torch.equal(routed(op_set(), x[part], again[part], padded=False)[0], out[part])
        assert torch.equal(again[part], digest[part])
    for padded in (False, True):
        ours, theirs = (
            routed(op_set(name), x, torch.zeros_like(digest), padded)[0].float() for name in ("invariant", "stock")
        )
        near = (ours - theirs).norm(dim=1) <= 0.05 * ours.norm(dim=1)  # stock logits route some tokens elsewhere
        assert near.float().mean() > 0.9
        assert not padded or not ours[::3].any()
