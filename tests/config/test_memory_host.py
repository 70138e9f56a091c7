"""What a run takes of the machine's own memory: steadily, and while a resume of it reads its checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vexact.config import Config, load_config
from vexact.config.memory import (
    Machine,
    ModelShape,
    Placement,
    memory_notes,
    memory_plan,
    memory_problems,
    memory_rows,
)
from vexact.config.memory.advice import with_value
from vexact.prepare.shapes import SHAPES

ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
GIB = 1 << 30
H100 = int(78.5 * GIB)
LENGTHS = ("data.max_prompt_length=512", "data.max_response_length=1024")


def configured(*overrides: str) -> Config:
    return load_config([*LENGTHS, *overrides], checked=False)


def shape(name: str) -> ModelShape:
    return ModelShape.of(SHAPES[name])


def test_a_reference_that_is_offloaded_is_on_the_host_in_its_own_type() -> None:
    model, offloaded = shape("qwen3-1.7b"), f"{REF}.fsdp_config.param_offload=true"
    two = Placement(2, 2, True)
    share = -(-model.num_parameters // 2)
    frozen = configured(f"{ACTOR}.use_kl_loss=true", offloaded)
    assert memory_plan(frozen, model, two, "cuda").host == 2 * share
    assert memory_plan(frozen, model, two, "cuda").host_at_resume == (2 + 12) * share
    assert memory_plan(frozen, model, two, "cpu").host == 0
    assert memory_plan(configured(offloaded), model, two, "cuda").host == 0, "no KL term is on"
    (problem,) = memory_problems(frozen, model, Machine("cuda", 1, H100, GIB))
    assert problem.fix == f"set {REF}.fsdp_config.param_offload=false, or use more GPUs"


READS = "while a resume reads its checkpoint"


@pytest.mark.parametrize(
    ("keys", "held", "at_resume", "said"),
    [
        ((), 0, 12, f"12.0 GiB per GPU in the machine's own {READS}"),
        (("param_offload",), 4, 16, f"4.0 GiB per GPU in the machine's own, 16.0 GiB {READS}"),
        (("optimizer_offload",), 8, 12, f"8.0 GiB per GPU in the machine's own, 12.0 GiB {READS}"),
        (("param_offload", "optimizer_offload"), 12, 16, f"12.0 GiB per GPU in the machine's own, 16.0 GiB {READS}"),
        (("async_save",), 12, 12, "12.0 GiB per GPU in the machine's own"),
    ],
)
def test_a_resume_reads_its_rows_beside_what_is_there(
    keys: tuple[str, ...], held: int, at_resume: int, said: str
) -> None:
    """Numbers are bytes per parameter, here of 2**30; ``tests/training/test_blank_state.py`` counts those of a state.
    No run is refused for what only a resume of it takes."""
    places = {"async_save": "checkpoint.async_save"}
    config = configured(*(f"{ACTOR}.{places.get(key, f'fsdp_config.{key}')}=true" for key in keys))
    model = shape("qwen3-1.7b")
    gpus = Placement(1, 1, True)
    plan = memory_plan(config, model, gpus, "cuda")
    assert (plan.host, plan.host_at_resume) == (held * model.num_parameters, at_resume * model.num_parameters)
    scaled = replace(plan, host=held * GIB, host_at_resume=at_resume * GIB)
    assert memory_rows(scaled, None)[-1] == ("memory", said)
    for room, fits in ((plan.host_at_resume, True), (plan.host_at_resume - 1, False)):
        machine = Machine("cuda", 1, 2 * H100, max(room, plan.host))
        notes = [note for note in memory_notes(config, model, machine) if note.startswith("reading a checkpoint")]
        assert len(notes) == (not fits and plan.host_at_resume > plan.host)
        assert memory_problems(config, model, machine) == []
    assert memory_plan(config, model, gpus, "cpu").host_at_resume == 0, "a process on a CPU has no memory beside it"


def test_gpus_that_only_sample_leave_their_share_of_the_machine_to_those_that_train() -> None:
    config = configured("trainer.rollout_gpus=6", f"{ACTOR}.fsdp_config.optimizer_offload=true")
    config = with_value(config, "trainer.n_gpus_per_node", 8)
    model = shape("qwen3-4b")
    need = memory_plan(config, model, Placement.of(config), "cuda").host
    assert memory_problems(config, model, Machine("cuda", 8, H100, -(-need // 4))) == []
    (problem,) = memory_problems(config, model, Machine("cuda", 8, H100, need // 4 - 1))
    assert f"takes {need / GIB:.1f} GiB per trainer GPU of the machine's memory" in problem.what
    two_nodes = with_value(config, "trainer.nnodes", 2)  # all eight of the first one train
    needed = memory_plan(two_nodes, model, Placement.of(two_nodes), "cuda").host
    assert len(memory_problems(two_nodes, model, Machine("cuda", 8, H100, needed - 1))) == 1
    assert memory_problems(two_nodes, model, Machine("cuda", 8, H100, needed)) == []
