"""`recompute_num_layers`: what it takes of memory, what `auto` makes of it, and what is said of it."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from vexact.config import Config, ConfigError, load_config
from vexact.config.memory import (
    Machine,
    ModelShape,
    Placement,
    memory_plan,
    memory_problems,
    out_of_memory_advice,
    with_recomputation,
)
from vexact.config.memory.activations import activation_bytes, layer_bytes_per_token
from vexact.config.memory.advice import with_value
from vexact.config.memory.recomputation import ROOMY
from vexact.config.plan import build_plan
from vexact.prepare.shapes import SHAPES

MODEL = "actor_rollout_ref.model"
KEY = f"{MODEL}.recompute_num_layers"
GIB = 1 << 30
QWEN3, EXPERTS = (ModelShape.of(SHAPES[name]) for name in ("qwen3-1.7b", "qwen3-30b-a3b"))


def configured(*overrides: str) -> Config:
    given = ["data.max_prompt_length=512", "data.max_response_length=1024", "data.train_files=t.jsonl", *overrides]
    return load_config([f"{MODEL}.path=m", *given], checked=False)


def update(config: Config, shape: ModelShape, machine: Machine) -> Any:
    plan = memory_plan(config, shape, Placement.of(config, machine.gpus), machine.device, machine.device_bytes)
    return next(stage for stage in plan.stages if stage.stage == "update")


def settled(machine: Machine, shape: ModelShape = QWEN3, *overrides: str) -> Any:
    return with_recomputation(configured(f"{KEY}=auto", *overrides), shape, machine).model.recompute_num_layers


def test_a_layer_that_is_kept_takes_its_activations_instead_of_two_streams() -> None:
    found = [activation_bytes(QWEN3, 1000, 2, recomputed=number) for number in range(29)]
    more = 1000 * (layer_bytes_per_token(QWEN3, 2) - 2 * 2 * QWEN3.hidden_size)
    assert [a - b for a, b in itertools.pairwise(found[:28])] == [more] * 27
    assert found[28] == found[27] + 1000 * 2 * 2 * QWEN3.hidden_size


def test_kept_layers_are_taken_to_be_those_with_most_to_keep() -> None:
    shape = replace(EXPERTS, num_layers=4, experts=replace(EXPERTS.experts, num_layers=2))  # type: ignore[type-var]
    dense, routed = (layer_bytes_per_token(shape, 2, experts=experts) for experts in (False, True))
    low, high = sorted((dense, routed))
    found = [activation_bytes(shape, 1, 2, recomputed=number) for number in (3, 2, 1, 0)]
    streams = 2 * 2 * shape.hidden_size
    assert [b - a for a, b in itertools.pairwise(found)] == [each - streams for each in (high, low, low)]


@pytest.mark.parametrize("shape", [QWEN3, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_auto_is_the_smallest_number_that_leaves_a_margin(shape: ModelShape, gpus: int) -> None:
    layers, tried = shape.num_layers, set()
    fixed = [with_value(configured(), KEY, n) for n in range(layers)]
    for gib in (*range(10, 120, 2), 200, 650, 980):
        machine = Machine("cuda", gpus, gib * GIB)
        number = settled(machine, shape)
        tried.add(number)
        needed = [update(config, shape, machine).total for config in fixed]
        fits = [n for n in range(layers) if needed[n] <= ROOMY * machine.device_bytes]
        assert number == min(fits, default=layers - 1)
    assert {0, layers - 1} < tried


def test_auto_leaves_room_for_a_cache_that_stays() -> None:
    rollout, machine = "actor_rollout_ref.rollout", Machine("cuda", 1, 78 * GIB)
    stays = f"{rollout}.free_cache_engine=false", f"{rollout}.gpu_memory_utilization=0.2"
    number = settled(machine, QWEN3, *stays)
    assert settled(machine) < number < 27
    stage = update(configured(f"{KEY}={number}", *stays), QWEN3, machine)
    assert stage.elastic > 0
    assert stage.total + stage.elastic <= ROOMY * machine.device_bytes


def test_auto_keeps_the_last_layer_where_nothing_is_known_or_nothing_fits() -> None:
    assert settled(Machine("cuda")) == settled(Machine("cuda", 1, GIB)) == 27
    assert memory_problems(configured(f"{KEY}=auto"), QWEN3, Machine("cuda", 1, 78 * GIB)) == []


@pytest.mark.parametrize("given", ["null", "0", "5"])
def test_any_other_value_stays(given: str) -> None:
    config = configured(f"{KEY}={given}")
    assert with_recomputation(config, QWEN3, Machine("cuda", 1, 78 * GIB)) is config


def test_more_layers_than_the_model_has_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"recompute_num_layers=29, but the model has 28 layers; set a number of them"
    ):
        build_plan(configured(f"{KEY}=29"), "cpu", QWEN3)
    with pytest.raises(ConfigError, match=r"recompute_num_layers=-1: must be >= 0"):
        configured(f"{KEY}=-1")
    with pytest.raises(ConfigError, match=r"recompute_num_layers='few'"):
        configured(f"{KEY}=few")


def test_the_plan_says_how_many() -> None:
    def said(*overrides: str) -> list[str]:
        plan = build_plan(configured(*overrides), Machine("cuda", 1, 78 * GIB), QWEN3)
        return [value for name, value in plan.rows if name == "recomputed"]

    assert said(f"{KEY}=null") == []
    assert said(f"{KEY}=5") == ["5 of 28 layers in the backward"]
    assert said() == [f"{settled(Machine('cuda', 1, 78 * GIB))} of 28 layers in the backward, as few as fit"]
    assert said(f"{KEY}=5", f"{MODEL}.enable_gradient_checkpointing=false") == []


def test_all_layers_are_recomputed_where_memory_is_short() -> None:
    machine = Machine("cuda", 1, 60 * GIB)
    config = configured(f"{KEY}=0", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768")
    (problem,) = memory_problems(config, QWEN3, machine)
    assert f"{KEY}=null (" in problem.fix
    for given in ("0", "auto"):
        assert f"{KEY}=null (now {given})" in out_of_memory_advice(configured(f"{KEY}={given}"), "update")
    assert f"{KEY}=null (now auto)" in out_of_memory_advice(configured(), "update")
    assert KEY not in out_of_memory_advice(configured(f"{KEY}=null"), "update")
