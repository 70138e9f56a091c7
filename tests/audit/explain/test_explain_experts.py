"""Faults planted in a mixture of experts and in latent attention: the finder names layer, operator, token, expert."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from moe_configs import DEEPSEEK_V3, QWEN3_MOE, with_router_biases

import vexact.ops as invariant
from vexact.audit.explain import explain, replay
from vexact.models import ModelConfig, random_model
from vexact.ops import ExpertGroups, Routes
from vexact.rollout import Engine, SamplingParams
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import routed_scores

PROMPT = tuple(np.random.default_rng(5).integers(2, 61, 40).tolist())
PARAMS = SamplingParams(max_tokens=6, temperature=0.8, ignore_eos=True)
CONFIGS = {
    "deepseek": DEEPSEEK_V3 | {"q_lora_rank": 28, "num_hidden_layers": 2},
    "qwen": QWEN3_MOE | {"num_hidden_layers": 2},
}
NUM_EXPERTS, TOP_K, LAYER, TOKEN, EXPERT = 8, 3, 1, 17, 5


def build(kind="deepseek", change=None):
    """An engine and a trainer's model with the same weights."""
    model = with_router_biases(random_model(ModelConfig.from_hf_dict(CONFIGS[kind]), seed=3)).requires_grad_(False)
    if change is not None:
        change(model)
    return Engine(model=copy.deepcopy(model), page_size=4, max_num_batched_tokens=32, seed=1), model


def plant(module, **ops):
    """In this module alone, as code of one layer that went wrong."""
    module.ops = dataclasses.replace(module.ops, **ops)


def generate(engine):
    (sample,) = engine.generate([PROMPT], PARAMS, ["step1/0"])
    return sample


def diagnose(engine, model, sample=None, **more):
    """The finder's answer for a sample whose log-probabilities or experts do differ."""
    sample = sample or generate(engine)
    sequence = TokenSequence(sample.prompt_token_ids, sample.token_ids, sample.inv_temperature, sample.min_logits)
    with torch.no_grad():
        scores, digests = routed_scores(model, pack_tokens([sequence]))
    same = (sample.logprobs.view(np.int32) == scores.logprobs.numpy().view(np.int32)).all()
    assert not (same and (sample.route_digests == digests.numpy()).all())
    return explain(engine, model, sample, sampling_params=PARAMS, **more)


def blamed(found):
    """Of whom the finder says that it does not compute what its arguments ask for."""
    return found.rollout.is_right, found.trainer.is_right


@pytest.mark.parametrize("kind", CONFIGS)
def test_nothing_planted_nothing_found(kind):
    engine, model = build(kind)
    found = explain(engine, model, generate(engine), sampling_params=PARAMS)
    assert not found.found, found.describe()


def test_logits_of_a_router_are_named_and_the_route_that_changes_for_it():
    engine, model = build()

    def rounded(x, weight, bias=None, **more):
        return invariant.linear(x, weight, bias, **more).mul(4).round() / 4

    plant(engine.model.layers[LAYER].mlp.router, linear=rounded)
    found = diagnose(engine, model)
    assert (found.stage, found.where) == ("operator", "linear of layers.1.mlp.router")
    assert (found.layer, found.position) == (LAYER, 0)
    assert found.expert == found.element[0]
    assert blamed(found) == (False, True)
    (note,) = (note for note in found.notes if "change experts; first" in note)
    assert "layer 1: token " in note
    assert note.endswith("; router logits different")


def without_preference(model):
    """All logits are alike."""
    model.layers[LAYER].mlp.router.weight.zero_()


def ties_by_the_highest_index(logits, bias=None, *, num_groups=1, digest=None, **settings):
    """Every expert is as good as any other; the last ones are chosen."""
    flipped = invariant.route(logits.flip(1), None if bias is None else bias.flip(0), num_groups=num_groups, **settings)
    experts, order = (logits.shape[1] - 1 - flipped.experts).sort(1)
    if digest is not None:
        from vexact.ops.moe.digest import digest_of

        digest += digest_of(experts, settings["salt"])
    return Routes(experts.int(), flipped.weights.gather(1, order))


def test_a_tie_broken_the_other_way_is_a_changed_route(tmp_path):
    engine, model = build("qwen", without_preference)
    plant(engine.model.layers[LAYER].mlp.router, route=ties_by_the_highest_index)
    found = diagnose(engine, model, out_path=tmp_path / "replay.pt")
    assert (found.stage, found.where, found.layer) == ("route", "route of layers.1.mlp.router (experts)", LAYER)
    assert found.summary == (
        "layer 1: token 0 chose experts 5, 6, 7 in the rollout and 0, 1, 2 in training; router logits equal"
    )
    assert (found.rollout.value, found.trainer.value) == ("experts 5, 6, 7", "experts 0, 1, 2")
    assert blamed(found) == (False, True)
    assert found.summary in found.describe()
    again = replay(tmp_path / "replay.pt")
    assert "not reproduced in a fresh process" in again.describe(), "an operator of the test is not in the package"
    assert (again.stage, again.summary) == (found.stage, found.summary)


def test_a_tie_of_one_token_names_this_token():
    engine, model = build("qwen")
    seen = []

    def one_token(logits, *rest, **settings):
        routes = invariant.route(logits, *rest, **settings)
        start, stop = sum(seen), sum(seen) + len(logits)
        seen.append(len(logits))
        if start <= TOKEN < stop:
            row = routes.experts[TOKEN - start]
            last = max(set(range(NUM_EXPERTS)) - set(row.tolist()))
            row.copy_(torch.tensor(sorted([*row.tolist()[:-1], last])))
        return routes

    sample = generate(engine)
    plant(engine.model.layers[LAYER].mlp.router, route=one_token)
    found = explain(engine, model, sample, sampling_params=PARAMS)
    assert (found.stage, found.layer, found.position) == ("route", LAYER, TOKEN)
    assert found.summary.startswith("layer 1: token 17 chose experts ")
    assert found.notes[0].startswith("1 of 45 tokens differ here")


def test_a_choice_of_other_groups_names_the_settings():
    engine, model = build()

    def ungrouped(logits, *rest, num_groups, top_groups, **settings):
        return invariant.route(logits, *rest, **settings)

    plant(engine.model.layers[LAYER].mlp.router, route=ungrouped)
    found = diagnose(engine, model)
    assert (found.stage, found.layer) == ("route", LAYER)
    assert "router logits equal" in found.summary
    assert blamed(found) == (False, True)


def test_a_router_that_is_asked_for_something_else():
    engine, model = build()
    router = engine.model.layers[LAYER].mlp.router
    router.moe = dataclasses.replace(router.moe, top_groups=4)
    found = diagnose(engine, model)
    assert (found.stage, found.layer, blamed(found)) == ("route", LAYER, (True, True))
    (note,) = (note for note in found.notes if note.startswith("arguments: "))
    assert "'top_groups': 4" in note.split("trainer")[0]
    assert "'top_groups': 2" in note.split("trainer")[1]


def test_weights_that_are_not_normalised_as_asked():
    engine, model = build("qwen")

    def rounded(logits, *rest, **settings):
        routes = invariant.route(logits, *rest, **settings)
        return routes._replace(weights=routes.weights.bfloat16().float())

    plant(engine.model.layers[LAYER].mlp.router, route=rounded)
    found = diagnose(engine, model)
    assert (found.stage, found.where) == ("operator", "route of layers.1.mlp.router (weights)")
    assert blamed(found) == (False, True)
    assert f"experts {found.expert}" in found.describe() or f", {found.expert}" in found.describe()


def test_a_pair_in_another_experts_place():
    engine, model = build("qwen")

    def shifted(experts, num_experts):
        rows, slots, offsets = invariant.group_tokens(experts, num_experts)
        return ExpertGroups(rows, slots.roll(1, 1).contiguous(), offsets)

    plant(engine.model.layers[LAYER].mlp.router, group_tokens=shifted)
    found = diagnose(engine, model)
    assert (found.stage, found.where, found.layer) == ("operator", "group_tokens of layers.1.mlp.router", LAYER)
    assert "another one's place" in found.describe()


def in_another_order(y, weights, groups, shared=None):
    """The last expert first."""
    total = torch.zeros(len(weights), y.shape[1]) if shared is None else shared.float()
    for j in reversed(range(weights.shape[1])):
        total = total + weights[:, j, None] * y[groups.slots[:, j].long()].float()
    return total.to(y.dtype)


def louder(model):
    """The last bits of what the experts add are not lost in the sum that they are added to."""
    model.layers[LAYER].mlp.experts.down_proj.mul_(1024)


@pytest.mark.parametrize("kind", CONFIGS)
def test_another_order_of_the_sum(kind):
    engine, model = build(kind, louder)
    plant(engine.model.layers[LAYER].mlp, combine=in_another_order)
    found = diagnose(engine, model)
    assert (found.stage, found.where, found.layer) == ("operator", "combine of layers.1.mlp", LAYER)
    assert (found.expert, blamed(found)) == (None, (False, True))
    assert found.rollout.value != found.trainer.value
    assert found.notes[-1].startswith("experts "), "whose rows were added"


@pytest.mark.parametrize(
    ("op", "tensor"), [("grouped_swiglu", "gate_up_proj"), ("grouped_linear", "down_proj")], ids=["first", "second"]
)
def test_the_rows_of_one_expert(op, tensor):
    engine, model = build()

    def wrong(x, weight, groups, *, gather):
        out = getattr(invariant, op)(x, weight, groups, gather=gather)
        first, last = groups.offsets[EXPERT : EXPERT + 2].tolist()
        out[first:last] *= 1.01
        return out

    plant(engine.model.layers[LAYER].mlp.experts, **{op: wrong})
    found = diagnose(engine, model)
    assert (found.stage, found.where) == ("operator", f"{op} of layers.1.mlp.experts.{tensor}")
    assert (found.layer, found.expert, blamed(found)) == (LAYER, EXPERT, (False, True))
    assert f"layer {LAYER}, expert {EXPERT}" in found.describe()
    chosen = [int(word) for word in found.notes[-1].removeprefix("experts ").split(" of ")[0].split(", ")]
    assert EXPERT in chosen
    assert found.element[0] == chosen.index(EXPERT)
    assert found.rollout.shape[:2] == (32, TOP_K)


def unsynced(name, spoil):
    engine, model = build()
    spoil(dict(engine.model.named_parameters())[name])
    found = diagnose(engine, model)
    assert (found.stage, found.summary) == ("weights", f"tensor {name} not synced")
    return found


@pytest.mark.parametrize("tensor", ["gate_up_proj", "down_proj"])
def test_the_weights_of_one_expert(tensor):
    found = unsynced(f"layers.1.mlp.experts.{tensor}", lambda p: p[EXPERT, 3, 2].mul_(1.5))
    assert (found.expert, found.element) == (EXPERT, (EXPERT, 3, 2))
    assert "of 8 experts 1 differ: 5" in found.notes


def test_a_correction_bias_and_a_row_of_the_router():
    found = unsynced("layers.1.mlp.router.bias", lambda p: p[6].add_(0.9))
    assert (found.expert, found.rollout.value - found.trainer.value) == (6, pytest.approx(0.9))
    found = unsynced("layers.1.mlp.router.weight", lambda p: p[3:5].mul_(2))
    assert found.expert == 3
    assert "of 8 experts 2 differ: 3, 4" in found.notes


def test_a_correction_bias_that_the_router_does_not_get():
    engine, model = build()
    plant(
        engine.model.layers[LAYER].mlp.router,
        route=lambda logits, bias, **settings: invariant.route(logits, **settings),
    )
    found = diagnose(engine, model)
    assert (found.stage, found.layer, blamed(found)) == ("route", LAYER, (False, True))


@pytest.mark.parametrize(
    ("part", "where"),
    [
        ("layers.1.mlp.shared", "linear of layers.1.mlp.shared.gate_up_proj"),
        ("layers.1.attention.kv_a_norm", "rms_norm of layers.1.attention.kv_a_norm"),
        ("layers.1.attention.q_a_norm", "rms_norm of layers.1.attention.q_a_norm"),
        ("kv_b_proj", "linear of layers.1.attention.kv_b_proj"),
        ("qkv_a_proj", "linear of layers.1.attention.qkv_a_proj"),
        ("q_b_proj", "linear of layers.1.attention.q_b_proj"),
        ("o_proj", "linear of layers.1.attention.o_proj"),
    ],
)
def test_parts_that_all_tokens_go_through(part, where):
    engine, model = build()
    op = where.split()[0]
    name = part if "." in part else "layers.1.attention"
    module = engine.model.get_submodule(name)
    chosen = module.get_submodule(part).weight if part != name and "." not in part else None

    def wrong(x, weight, *rest, **more):
        out = getattr(invariant, op)(x, weight, *rest, **more)
        return out * (1 + 1e-6) if chosen is None or weight is chosen else out

    plant(module, **{op: wrong})
    found = diagnose(engine, model)
    assert (found.stage, found.where, found.layer) == ("operator", where, LAYER)
    assert (found.expert, blamed(found)) == (None, (False, True))


def test_the_rotated_part_and_its_angles():
    engine, model = build()

    def late(q, k_plain, k_rotated, positions, cos_sin, interleaved):
        return invariant.latent_rope(q, k_plain, k_rotated, positions + 1, cos_sin, interleaved)

    plant(engine.model.layers[LAYER].attention, latent_rope=late)
    found = diagnose(engine, model)
    assert (found.stage, found.where) == ("operator", "latent_rope of layers.1.attention (query)")
    assert (found.layer, blamed(found)) == (LAYER, (False, True))


def test_pairs_that_turn_together_chosen_otherwise():
    engine, model = build()
    attention = engine.model.layers[LAYER].attention
    attention.mla = dataclasses.replace(attention.mla, interleaved=False)
    found = diagnose(engine, model)
    assert (found.stage, found.where) == ("operator", "latent_rope of layers.1.attention (query)")
    assert "arguments: rollout {'interleaved': False}, trainer {'interleaved': True}" in found.notes


def test_a_stale_page_of_expanded_keys(monkeypatch):
    engine, model = build()
    generate(engine)
    for parameter in model.parameters():
        parameter.mul_(1.01)
    with monkeypatch.context() as patch:
        patch.setattr(engine._blocks, "clear_cache", lambda: None)
        engine.update_weights(model.named_parameters(), version=1)
    found = diagnose(engine, model)
    assert (found.stage, found.layer, found.position) == ("kv page", 0, 0)


def test_a_route_that_was_another_one_at_generation_time():
    engine, model = build("qwen")
    sample = generate(engine)
    digests = sample.route_digests.copy()
    digests[2:] += 1
    found = diagnose(engine, model, dataclasses.replace(sample, route_digests=digests))
    assert (found.stage, found.where, found.response_position) == ("generation state", "routes", 2)
    assert "4 of 6 rows went to other experts at generation than now" in found.summary
