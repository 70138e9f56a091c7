"""Where the scripts in examples/moe say that their models fit, the memory plan agrees; and without experts."""

from __future__ import annotations

from typing import Any

import pytest
from moe_configs import QWEN3_MOE

from vexact.config import load_config
from vexact.config.memory import Machine, ModelShape, Placement, memory_plan, memory_problems, out_of_memory_advice
from vexact.config.memory.activations import activation_bytes
from vexact.config.plan import build_plan
from vexact.prepare.shapes import SHAPES

GIB = 1 << 30
H100, H200 = int(78.5 * GIB), 138 * GIB  # free on a GPU of 80 and of 141 GB
ARCH = {"qwen3_30b_a3b": "qwen3-30b-a3b", "moonlight": "moonlight-16b-a3b"}


EXPERTS = "actor_rollout_ref.actor.fsdp_config.expert_parallel_size"
SLEEP = "actor_rollout_ref.rollout.enable_sleep_mode=true"
FOUR = (SLEEP, f"{EXPERTS}=4", "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=4096")


def problems(recipe: str, gpus: int, free: int, *more: str) -> list[str]:
    config = load_config([f"recipe={recipe}", f"trainer.n_gpus_per_node={gpus}", *more], checked=False)
    shape = ModelShape.of(SHAPES[ARCH[recipe]])
    return [str(problem) for problem in memory_problems(config, shape, Machine("cuda", gpus, free))]


@pytest.mark.parametrize(
    ("recipe", "gpus", "free", "more"),
    [
        ("qwen3_30b_a3b", 8, H200, ()),
        ("qwen3_30b_a3b", 8, H100, (SLEEP,)),
        ("qwen3_30b_a3b", 4, H100, FOUR),
        ("qwen3_30b_a3b", 8, H100, ("trainer.rollout_gpus=2",)),
        ("qwen3_30b_a3b", 8, H100, ("trainer.rollout_gpus=2", "trainer.async_steps=1")),
        ("qwen3_30b_a3b", 8, H100, ("trainer.rollout_gpus=2", f"{EXPERTS}=2")),
        ("moonlight", 8, H100, ()),
        ("moonlight", 8, H100, (f"{EXPERTS}=8",)),
        ("moonlight", 2, H200, ()),
    ],
)
def test_it_fits(recipe: str, gpus: int, free: int, more: tuple[str, ...]) -> None:
    assert problems(recipe, gpus, free, *more) == []


def test_four_gpus_of_80_gb_train_all_of_the_30b_with_room_to_spare() -> None:
    """512 + 1,024 tokens, every stage, and the machine's own memory; the largest key-value cache included."""
    lengths = ("data.max_prompt_length=512", "data.max_response_length=1024")
    config = load_config(["recipe=qwen3_30b_a3b", "trainer.n_gpus_per_node=4", *FOUR, *lengths], checked=False)
    shape = ModelShape.of(SHAPES["qwen3-30b-a3b"])
    plan = memory_plan(config, shape, Placement.of(config), "cuda", 78 * GIB)
    assert [stage.stage for stage in plan.stages] == ["generation", "update", "sync"]
    assert all(stage.total + stage.elastic <= 74 * GIB for stage in plan.stages)
    assert plan.host * 4 <= 400 * GIB
    assert plan.kv_cache_bytes is not None
    assert plan.kv_cache_bytes // (48 * 2 * 4 * 128 * 2) >= 32 * 1536, "every sample of a step at once"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_rollout_that_sleeps_holds_no_weights_in_an_update(device: str) -> None:
    """But in generation and sync; the start-up plan says so."""
    shape, two = ModelShape.of(SHAPES["qwen3-1.7b"]), Placement(2, 2, True)
    configs = [load_config(more, checked=False) for more in ([], [SLEEP])]
    awake, asleep = (memory_plan(config, shape, two, device).stages for config in configs)
    width = 2 if device == "cuda" else 4
    for before, after in zip(awake, asleep, strict=True):
        assert before.parts["rollout weights"] == width * shape.num_parameters
        gone = {"rollout weights"} if before.stage == "update" else set()
        assert after.parts == {name: size for name, size in before.parts.items() if name not in gone}
    rows = [dict(build_plan(config, device, shape).rows)["placement"] for config in configs]
    assert rows[1] == f"{rows[0]}; the rollout's weights are given back for every update"


def test_sleep_is_advised_where_it_makes_room() -> None:
    apart = load_config(["trainer.rollout_gpus=1"], checked=False)
    for stage in ("update", "generation"):
        told = out_of_memory_advice(load_config([], checked=False), stage), out_of_memory_advice(apart, stage)
        assert [SLEEP in advice for advice in told] == [stage == "update", False]
    assert SLEEP not in out_of_memory_advice(load_config([SLEEP], checked=False), "update")


def test_where_both_sides_do_not_fit_one_gpu_the_rollout_sleeps_or_has_its_own() -> None:
    (problem,) = problems("qwen3_30b_a3b", 8, H100)
    assert "update needs" in problem
    assert problem.endswith(f"; set {SLEEP} (47.8 GiB less)")
    (problem,) = problems("qwen3_30b_a3b", 8, H100, "actor_rollout_ref.rollout.name=another")
    assert problem.endswith("; set trainer.rollout_gpus=2"), "it keeps its weights in its own way"
    (problem,) = problems("qwen3_30b_a3b", 2, H100)
    assert "; no setting makes room for it here: use 4 GPUs with actor_rollout_ref.rollout.enable_sleep" in problem
    (problem,) = problems("moonlight", 1, H100)
    assert "no setting makes room for it here: use 2 GPUs with" in problem, "a whole trainer does not fit one GPU"


def test_what_else_it_takes_is_said() -> None:
    kept = "actor_rollout_ref.actor.fsdp_config.optimizer_offload=false"
    (problem,) = problems("qwen3_30b_a3b", 8, H100, kept)
    settings = problem.rsplit("; set ", 1)[1].split(" and ")
    assert settings == [SLEEP, kept.replace("false", "true")]
    assert problems("qwen3_30b_a3b", 8, H100, *settings) == []


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        ("qwen3_30b_a3b", "8 of 128 a token, in 48 of 48 layers; not balanced"),
        ("moonlight", "6 of 64 a token and a shared one, in 26 of 27 layers; not balanced"),
        ("tiny_moe", "8 of 128 a token, in 48 of 48 layers; balanced by a loss of weight 0.01"),
        (
            "tiny_moonlight",
            "6 of 64 a token and a shared one, in 26 of 27 layers; balanced by a bias that moves by 0.001 a step",
        ),
    ],
)
def test_the_plan_says_how_experts_are_used(recipe: str, row: str) -> None:
    arch = "qwen3-30b-a3b" if "moe" in recipe or "30b" in recipe else "moonlight-16b-a3b"
    plan = build_plan(load_config([f"recipe={recipe}"], checked=False), "cpu", ModelShape.of(SHAPES[arch]))
    assert dict(plan.rows)["experts"] == row


@pytest.mark.parametrize("changes", [{"decoder_sparse_step": 4}, {"mlp_only_layers": [0, 1, 2]}])
def test_a_mixture_without_a_layer_of_experts_is_a_dense_model(changes: dict[str, Any]) -> None:
    shape, dense = ModelShape.of(QWEN3_MOE | changes), ModelShape.of(QWEN3_MOE | {"num_experts": None})
    assert shape == dense
    assert activation_bytes(shape, 8, 4, rows_travel=True) == activation_bytes(dense, 8, 4)
