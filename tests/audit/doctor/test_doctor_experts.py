"""The doctor's probes of experts: right on this machine, and every operator that goes wrong is named."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from moe_configs import FAMILIES, with_router_biases

import vexact.ops as invariant
from vexact.audit.doctor import expert_probes, model_probes
from vexact.models import ModelConfig, random_model, save_hf
from vexact.ops import ExpertGroups
from vexact.ops.cpu.moe import grouped_linear as twin

FP32 = torch.float32
FEW = 200  # places; fewer than all tokens have, more than the tokens of one expert


def probe(**changes):
    return expert_probes.check_expert_products("cpu", FP32, **changes)


def test_products_are_right_here():
    found = probe()
    assert (found.status, found.message.split(": ")[1]) == ("ok", "96 x 64, 64 x 48")


def nudged(function):
    """Another last bit where many places are taken."""

    def wrong(*args):
        offsets = next(a for a in args if torch.is_tensor(a) and a.shape == (expert_probes.TINY.num_experts + 1,))
        return function(*args) * (1 + 2e-7 * (int(offsets[-1]) > FEW))

    return wrong


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("forward", "gate and up of expert 0, against a plain product"),
        ("swiglu_forward", "gate and up joined with the activation"),
        ("grad_input", "the gradient of rows of expert 0, without the others"),
        ("grad_weight", "the gradient of gate and up of expert 0, without the others"),
    ],
)
def test_a_grouped_product_that_sees_its_company_is_named(monkeypatch, name, says):
    monkeypatch.setattr(twin, name, nudged(getattr(twin, name)))
    found = probe()
    assert found.status == "error"
    assert says in found.message


def test_a_gradient_that_takes_in_another_experts_rows_is_named(monkeypatch):
    right = twin.grad_weight

    def shifted(dy, x, rows, offsets, top_k):
        return right(
            dy, x, rows, offsets.clone().index_add_(0, torch.tensor([1]), torch.ones(1, dtype=torch.int32)), top_k
        )

    monkeypatch.setattr(twin, "grad_weight", shifted)
    assert "the gradient of gate and up of expert 0" in probe().message


def test_a_sum_that_starts_elsewhere_is_named(monkeypatch):
    def flipped(y, weights, groups, shared=None):
        if len(weights) > 60:
            groups, weights = groups._replace(slots=groups.slots.flip(1).contiguous()), weights.flip(1).contiguous()
        return invariant.combine(y, weights, groups, shared)

    monkeypatch.setattr(expert_probes, "combine", flipped)
    assert "the sum over experts of expert 0, without" in probe().message


def test_an_order_of_places_that_is_not_that_of_tokens_is_named(monkeypatch):
    def unstable(experts, num_experts):
        rows, slots, offsets = groups = invariant.group_tokens(experts, num_experts)
        if (slots < 0).any():
            return groups
        first, last = offsets[:2].tolist()
        rows[first:last] = rows[first:last].flip(0)
        places = torch.arange(len(rows), dtype=torch.int32)
        return ExpertGroups(
            rows, torch.empty_like(slots).view(-1).index_put_((rows.long(),), places).view_as(slots), offsets
        )

    monkeypatch.setattr(expert_probes, "group_tokens", unstable)
    assert "groups of 8 experts" in probe().message


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_the_shapes_of_a_model_with_experts_are_probed(tmp_path, family):
    config = ModelConfig.from_hf_dict(FAMILIES[family])
    save_hf(with_router_biases(random_model(config, seed=0)).named_parameters(), config, tmp_path)
    results = list(model_probes.model_probe_checks(str(tmp_path), "cpu"))
    assert [result.status for result in results] == ["ok"] * 5
    text = "\n".join(map(str, results))
    assert (
        "model experts fp32: routes, rows and gradients have the same bits in batches of 1 to 100: 3 of 8 experts"
        in text
    )
    assert "model grouped products fp32" in text
    assert "40 x 32, 32 x 20" in text
    if config.mla is not None:
        names = model_probes.Shapes.of(config).products
        assert names["latent vectors"] == (28 + 24 + 8, 32)
        assert names["queries"] == (4 * 20, 28)
        assert names["keys and values"] == (4 * 22, 24)
        assert "4 heads over 2 of 20 (values 10)" in text or "2 heads over 2 of 20 (values 10)" in text


def test_experts_that_no_layer_has_are_not_probed(tmp_path):
    config = ModelConfig.from_hf_dict(FAMILIES["qwen3-moe"] | {"mlp_only_layers": [0, 1, 2]})
    save_hf(random_model(config, seed=0).named_parameters(), config, tmp_path)
    names = [str(result) for result in model_probes.model_probe_checks(str(tmp_path), "cpu")]
    assert len(names) == 3
    assert not any("expert" in name or "grouped" in name for name in names)


def test_many_experts_are_cut_to_those_that_repeat():
    moe = dataclasses.replace(expert_probes.TINY, num_experts=64, top_k=6, num_groups=4, top_groups=1)
    assert expert_probes._fewer(moe).num_experts == 4 * 6
    assert probe(moe=moe).status == "ok"
