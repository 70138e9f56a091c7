"""The layer of a few tokens in two launches has the bits of the operators it stands for."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from linear_support import tensor_core  # noqa: F401
from rowwise import DEVICE, poisoned_outputs, randn, same_bits
from torch import Tensor
from torch._subclasses import FakeTensorMode

from vexact.models.config import MoeConfig
from vexact.models.layers import moe as layers_moe
from vexact.models.layers.context import Routing
from vexact.models.layers.moe import MoE
from vexact.models.opset import op_set
from vexact.ops import dispatch
from vexact.ops.kernels.moe import combine, few, grouped_linear, router
from vexact.ops.moe import few_tokens

BF16 = torch.bfloat16
# NaN and infinities are among the inputs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning", "ignore:invalid value:RuntimeWarning"),
    pytest.mark.usefixtures("fused_multiply_add"),
]
# experts, hidden, width; then top_k, scoring, num_groups, top_groups, normalize, scale, round_to, salt; bias, shared
MODELS = {
    "qwen3": (32, 72, 40, (8, "softmax", 1, 1, True, 1.0, BF16, 5), False, False),
    "mixtral": (8, 72, 56, (2, "softmax", 1, 1, True, 1.0, torch.float32, 0), False, False),
    "moonlight": (64, 72, 24, (6, "sigmoid", 1, 1, True, 2.446, torch.float32, 3), True, True),
    "deepseek-v3": (48, 64, 40, (4, "sigmoid", 8, 4, True, 2.5, torch.float32, 1), True, True),
    "deepseek-v2": (60, 80, 24, (6, "softmax", 5, 3, False, 16.0, torch.float32, 2), False, True),
    "all of them": (5, 48, 33, (5, "sigmoid", 1, 1, False, 1.0, torch.float16, 9), True, False),
    "one": (1, 40, 16, (1, "softmax", 1, 1, True, 1.0, BF16, 0), False, False),
}


def layer(name: str, tokens: int, dtype: torch.dtype = BF16) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """x, logits, bias, gate_up, down, shared; the router's settings."""
    experts, hidden, width, settings, biased, shares = MODELS[name]
    x, logits = randn(tokens, hidden, seed=1, dtype=dtype), (randn(tokens, experts, seed=2) * 4).round() / 4
    bias = randn(experts, seed=3, scale=0.1) if biased else None
    gate_up = randn(experts, 2 * width, hidden, seed=4, dtype=dtype)
    down = randn(experts, hidden, width, seed=5, dtype=dtype)
    return (x, logits, bias, gate_up, down, randn(tokens, hidden, seed=6, dtype=dtype) if shares else None), settings


def by_operator(tensors: tuple[Any, ...], digest: Tensor, padding: Tensor | None, settings: tuple[Any, ...]) -> Tensor:
    x, logits, bias, gate_up, down, shared = tensors
    _, weights, rows, slots, offsets = router.grouped_forward(logits, bias, digest, padding, *settings)
    act = grouped_linear.swiglu_forward(x, gate_up, rows, offsets, settings[0])
    return combine.forward(grouped_linear.forward(act, down, None, offsets, settings[0]), weights, slots, shared)


def in_two_launches(
    tensors: tuple[Any, ...], digest: Tensor, padding: Tensor | None, settings: Any, **t: Any
) -> Tensor:
    x, logits, bias, gate_up, down, shared = tensors
    return few.forward(x, logits, bias, digest, padding, gate_up, down, shared, *settings, **t)


@pytest.mark.parametrize(("tokens", "padded"), [(1, False), (3, True)])
@pytest.mark.parametrize("name", MODELS)
def test_two_launches_have_the_bits_of_the_operators(name, tokens, padded):
    tensors, settings = layer(name, tokens)
    padding = torch.arange(tokens, device=DEVICE) % 2 == 1 if padded else None
    digests = torch.full((2, tokens), 7, device=DEVICE)
    with poisoned_outputs():
        expected = by_operator(tensors, digests[0], padding, settings)
        found = in_two_launches(tensors, digests[1], padding, settings)
    assert same_bits(found, expected)
    assert torch.equal(digests[0], digests[1])


def test_no_bit_depends_on_a_tile():
    tensors, settings = layer("mixtral", 2)
    digest = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    expected = by_operator(tensors, digest, None, settings)
    for gated_tile, down_tile in zip(few.GATED_TILES, few.DOWN_TILES, strict=True):
        with poisoned_outputs():
            found = in_two_launches(tensors, digest, None, settings, gated_tile=gated_tile, down_tile=down_tile)
        assert same_bits(found, expected), (gated_tile, down_tile)


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_signs_of_zero_and_what_is_not_finite(dtype):
    tensors, settings = layer("mixtral", 3, dtype)
    x, logits, _, gate_up, down, _ = tensors
    x[0], down[:, ::3] = 0.0, -0.0
    x[1, 5], logits[2, 1] = float("inf"), float("nan")
    gate_up[3, 2] = -1e-30 if dtype is BF16 else -1e-7
    digest = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    expected = by_operator(tensors, digest, None, settings)
    found = in_two_launches(tensors, digest, None, settings)
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.nan_to_num(1.0), expected.nan_to_num(1.0))


def test_a_token_has_its_bits_alone_and_in_company():
    tensors, settings = layer("mixtral", 4)
    together = in_two_launches(tensors, torch.zeros(4, dtype=torch.int64, device=DEVICE), None, settings)
    for token in (0, 3):
        mine = tuple(t[token : token + 1] if t is not None and t.shape[0] == 4 else t for t in tensors)
        digest = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        assert same_bits(in_two_launches(mine, digest, None, settings)[0], together[token])


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of CPU tensors by their kernels, interpreted."""
    monkeypatch.setattr(dispatch, "module", lambda op, tensor: dispatch._load("kernels", op))


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_layer_takes_them_where_it_can(monkeypatch):
    config = MoeConfig(12, 3, 24, frozenset({3}), scoring="sigmoid", correction_bias=True, shared_intermediate_size=16)
    with torch.device(DEVICE):
        moe = MoE(72, config, 3, op_set()).to(BF16)
    for seed, parameter in enumerate(moe.parameters()):
        parameter.data.copy_(randn(*parameter.shape, seed=seed, scale=0.2))
    x, padding = randn(3, 72, seed=9, dtype=BF16), torch.tensor([False, False, True], device=DEVICE)
    taken: list[int] = []
    launch = few.forward
    monkeypatch.setattr(few, "forward", lambda *args, **options: taken.append(1) or launch(*args, **options))

    def run(loads: bool = False) -> tuple[Tensor, Tensor]:
        digest = torch.zeros(3, dtype=torch.int64, device=DEVICE)
        held = torch.zeros(4, 12, dtype=torch.int32, device=DEVICE) if loads else None
        with torch.no_grad():
            return moe(x, digest, Routing(padding=padding, loads=held)), digest

    expected = run()
    assert not taken  # on a CPU it has no launches to save
    for module in (few_tokens, layers_moe):
        monkeypatch.setattr(module, "takes_few", few_tokens.fits)
    found, with_loads = run(), run(loads=True)
    assert taken == [1]  # loads are counted from the groups, which the two launches do not make
    for out, digest in (found, with_loads):
        assert same_bits(out, expected[0])
        assert torch.equal(digest, expected[1])
    monkeypatch.undo()
    assert not few_tokens.takes_few(x, 3, moe.experts.down_proj)


@pytest.mark.parametrize(
    ("rows", "top_k", "dtype", "fits"),
    [
        *((1, 8, BF16, True), (4, 16, BF16, True), (1, 8, torch.float16, True)),
        *((5, 8, BF16, False), (0, 8, BF16, False), (1, 17, BF16, False), (1, 8, torch.float32, False)),
    ],
)
def test_what_fits(rows, top_k, dtype, fits):
    x, down = torch.empty(rows, 16, dtype=dtype), torch.empty(32, 16, 8, dtype=dtype)
    assert few_tokens.fits(x, top_k, down) == fits
    assert not few_tokens.fits(x, top_k, down.double())


def test_a_gpu_takes_them_for_one_and_two_tokens_without_gradients():
    with FakeTensorMode():
        down = torch.empty(32, 16, 8, dtype=BF16, device="cuda")
        rows = [torch.empty(number, 16, dtype=BF16, device="cuda") for number in (1, 2, 3, 4)]
    with torch.no_grad():
        assert [few_tokens.takes_few(x, 8, down) for x in rows] == [True, True, False, False]
        assert not few_tokens.takes_few(rows[0], 17, down)
    assert not few_tokens.takes_few(rows[0], 8, down)


def test_what_does_not_fit_together():
    x, logits = torch.zeros(2, 16, dtype=BF16), torch.zeros(2, 4)
    gate_up, down = torch.zeros(4, 16, 16, dtype=BF16), torch.zeros(4, 16, 8, dtype=BF16)

    def refuses(match: str, *tensors: Any, **changed: Any) -> None:
        with pytest.raises(ValueError, match=re.escape(match)):
            few_tokens.few_tokens(*tensors, **{"top_k": 2} | changed)

    refuses("logits is (1, 4), expected (2, 4)", x, logits[:1], None, gate_up, down, None)
    refuses("gate_up is (4, 15, 16), expected (4, 16, 16)", x, logits, None, gate_up[:, 1:], down, None)
    refuses("down is (3, 16, 8), expected (4, 16, 8)", x, logits, None, gate_up, down[1:], None)
    refuses("shared is (1, 16), expected (2, 16)", x, logits, None, gate_up, down, x[:1])
    refuses("x is torch.bfloat16 but shared is torch.float16", x, logits, None, gate_up, down, x.half())
    refuses("padding", x, logits, None, gate_up, down, None, padding=torch.zeros(3, dtype=torch.bool))
    refuses("top_k", x, logits, None, gate_up, down, None, top_k=5)
    refuses("not x (2, 16) of torch.float32", x.float(), logits, None, gate_up, down, None)
