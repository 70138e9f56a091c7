"""Where the scripts in examples/moe say that their models fit, the memory plan agrees."""

from __future__ import annotations

import pytest

from vexact.config import load_config
from vexact.config.memory import Machine, ModelShape, memory_problems
from vexact.config.plan import build_plan
from vexact.prepare.shapes import SHAPES

GIB = 1 << 30
H100, H200 = int(78.5 * GIB), 138 * GIB  # free on a GPU of 80 and of 141 GB
ARCH = {"qwen3_30b_a3b": "qwen3-30b-a3b", "moonlight": "moonlight-16b-a3b"}


EXPERTS = "actor_rollout_ref.actor.fsdp_config.expert_parallel_size"


def problems(recipe: str, gpus: int, free: int, *more: str) -> list[str]:
    config = load_config([f"recipe={recipe}", f"trainer.n_gpus_per_node={gpus}", *more], checked=False)
    shape = ModelShape.of(SHAPES[ARCH[recipe]])
    return [str(problem) for problem in memory_problems(config, shape, Machine("cuda", gpus, free))]


@pytest.mark.parametrize(
    ("recipe", "gpus", "free", "more"),
    [
        ("qwen3_30b_a3b", 8, H200, ()),
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


def test_where_both_sides_do_not_fit_one_gpu_some_are_for_the_rollout_alone() -> None:
    (problem,) = problems("qwen3_30b_a3b", 8, H100)
    assert "update needs" in problem
    assert problem.endswith("; set trainer.rollout_gpus=2")
    (problem,) = problems("qwen3_30b_a3b", 2, H100)
    assert problem.endswith(
        "; no setting makes room for it here: use 8 GPUs with trainer.rollout_gpus=2, or a smaller model"
    )
    (problem,) = problems("moonlight", 2, H100)
    assert "no setting makes room for it here: use 4 GPUs" in problem, "a whole trainer does not fit one GPU"


def test_what_else_it_takes_is_said() -> None:
    kept = "actor_rollout_ref.actor.fsdp_config.optimizer_offload=false"
    (problem,) = problems("qwen3_30b_a3b", 8, H100, kept)
    settings = problem.rsplit("; set ", 1)[1].split(" and ")
    assert settings == ["trainer.rollout_gpus=2", kept.replace("false", "true")]
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
