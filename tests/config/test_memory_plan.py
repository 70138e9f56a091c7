"""The memory plan: bytes worked out by hand, what is refused, and what is said to lower."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from moe_configs import FAMILIES, MOONLIGHT, QWEN3_MOE

from vexact.config import Config, ConfigError, load_config
from vexact.config.memory import (
    Machine,
    ModelShape,
    Placement,
    memory_notes,
    memory_plan,
    memory_problems,
    memory_rows,
    out_of_memory_advice,
)
from vexact.config.memory.activations import layer_bytes_per_token
from vexact.config.memory.advice import with_value
from vexact.config.memory.plan import BUCKET_BYTES, CONTEXT_BYTES, NCCL_BYTES
from vexact.config.plan import build_plan
from vexact.distributed import Layout
from vexact.models import CausalLM, ModelConfig
from vexact.prepare.shapes import SHAPES
from vexact.trainer.preflight.dry_run import check_settings
from vexact.trainer.preflight.machine import machine_of

MODEL, ACTOR, ROLLOUT = "actor_rollout_ref.model", "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
GIB = 1 << 30
H100 = int(78.5 * GIB)
ONE, TWO = Placement(1, 1, True), Placement(2, 2, True)

# a layer: attention 2 x 8 x 4 x (4 + 2) = 384, MLP 3 x 8 x 16 = 384, norms 16: 784; root: 10 x 8 + 8 = 88; all: 1656
TINY = ModelShape.of(
    {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 16,
        "vocab_size": 10,
        "tie_word_embeddings": True,
    }
)
SMALL = (
    "data.max_prompt_length=8",
    "data.max_response_length=8",
    f"{ACTOR}.ppo_max_token_len_per_gpu=32",
    f"{ROLLOUT}.max_num_batched_tokens=16",
    f"{ROLLOUT}.max_num_seqs=2",
    f"{ROLLOUT}.page_size=4",
    f"{ROLLOUT}.num_pages=5",
    f"{ROLLOUT}.enforce_eager=true",
)


def configured(*overrides: str) -> Config:
    return load_config(list(overrides), checked=False)


def stages_of(config: Config, placement: Placement, device: str, free: int | None = None) -> dict[tuple[str, str], Any]:
    plan = memory_plan(config, TINY, placement, device, free)
    return {(stage.role, stage.stage): stage for stage in plan.stages}


def test_shape_counts() -> None:
    assert (TINY.layer_parameters, TINY.root_parameters, TINY.num_parameters) == (784, 88, 1656)
    assert TINY.kv_values_per_token == 2 * 2 * 2 * 4


def test_latent_attention_by_hand() -> None:
    """Moonlight's shape in small: keys of 4 + 2 numbers, values of 3, both expanded from 5."""
    sizes = {
        "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 2,
        "intermediate_size": 16, "vocab_size": 10, "tie_word_embeddings": True, "kv_lora_rank": 5, "q_lora_rank": None,
        "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 3,
    }  # fmt: skip
    latent = ModelShape.of(sizes)
    assert (latent.key_dim, latent.value_dim) == (6, 3)
    assert latent.kv_values_per_token == 3 * 4 * (6 + 3)
    others = 8 * (5 + 2) + 5 * 4 * (4 + 3) + 4 * 3 * 8
    assert latent.attention_parameters == 8 * 4 * 6 + others
    assert ModelShape.of(sizes | {"q_lora_rank": 7}).attention_parameters == 7 * (8 + 4 * 6) + others
    numbers = 4 * 8 + 3 * 16 + 2 * (4 + 4) * 6 + (4 + 4) * 3
    assert layer_bytes_per_token(latent, 2) == 2 * numbers + 4 * (2 + 4 + 4 + 4)
    row = dict(build_plan(configured(*SMALL), "cpu", latent).rows)["key-value cache"]
    assert row == "432 bytes a token: 3 layers of 4 keys of 6 and values of 3 numbers, float32"
    cache = memory_plan(configured(*SMALL), latent, ONE, "cpu").stages[0].parts["key-value cache"]
    assert cache == 5 * 4 * 432


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_and_latent_attention_are_counted(name: str) -> None:
    """All but biases and the norms of heads and latent vectors."""
    config = ModelConfig.from_hf_dict(FAMILIES[name])
    with torch.device("meta"):
        model = CausalLM(config)
    small = ("q_norm.weight", "k_norm.weight", "q_a_norm.weight", "kv_a_norm.weight", ".bias")
    counted = sum(p.numel() for key, p in model.named_parameters() if not key.endswith(small))
    shape, moe = ModelShape.of(FAMILIES[name]), config.moe
    assert shape.num_parameters == counted
    idle = (moe.num_experts - moe.top_k) * 3 * config.hidden_size * moe.intermediate_size
    assert shape.num_active_parameters == counted - idle * len(moe.layers)
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    assert shape.layer_parameters == pytest.approx(max(layers), rel=0.02)


def test_the_plan_says_what_one_token_meets() -> None:
    """Qwen3-30B-A3B and Moonlight-16B-A3B as they are published."""
    qwen = ModelShape.of(
        QWEN3_MOE
        | {
            **{"vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32},
            **{"num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8},
            **{"moe_intermediate_size": 768, "intermediate_size": 6144},
        }
    )
    moonlight = ModelShape.of(
        MOONLIGHT
        | {
            **{"vocab_size": 163840, "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16},
            **{"num_key_value_heads": 16, "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2},
            **{"moe_intermediate_size": 1408, "intermediate_size": 11264, "kv_lora_rank": 512},
            **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
        }
    )
    assert (qwen.num_parameters / 1e9, qwen.num_active_parameters / 1e9) == pytest.approx((30.53, 3.35), abs=0.01)
    assert moonlight.num_parameters / 1e9 == pytest.approx(15.96, abs=0.01)
    rows = dict(build_plan(configured(*SMALL), "cpu", qwen).rows)
    assert "30.5 B parameters, 3.35 B of them for one token" in rows["model"]
    assert "of them for one token" not in dict(build_plan(configured(*SMALL), "cpu", TINY).rows)["model"]


def test_experts_take_memory_for_rows_and_for_all_of_their_weights() -> None:
    shape, dense = ModelShape.of(QWEN3_MOE), ModelShape.of(QWEN3_MOE | {"num_experts": None})
    config = configured(*SMALL)
    plans = [memory_plan(config, one, ONE, "cpu") for one in (shape, dense)]
    update, plain = (next(stage.parts for stage in plan.stages if stage.stage == "update") for plan in plans)
    assert update["master weights"] == update["gradients"] == 4 * shape.num_parameters
    assert update["moments"] == 8 * shape.num_parameters
    # instead of an MLP of 40, k = 3 rows of 3 x 20 + 32, in passing 2 x 32 + 2 x 20; of the router 8 + 4 x 3 numbers
    rows = 4 * (3 * (60 + 32) - 120) + 4 * (8 + 12)
    passing = 4 * (3 * (64 + 40) - 80)
    assert update["activations"] - plain["activations"] == 32 * (rows + passing)
    generation, without = (plan.stages[0].parts["rollout workspace"] for plan in plans)
    assert generation - without == 16 * 4 * (3 * 92 - 120) + 2 * config.max_model_len * 8


def test_experts_that_groups_share_by_hand() -> None:
    """8 experts of 3 x 32 x 20 numbers over four trainers: a group gathers a part, and rows come from all of them."""
    shape, four, expert = ModelShape.of(QWEN3_MOE), Placement(4, 4, True), 4 * 3 * 32 * 20
    keys = f"{ACTOR}.fsdp_config.expert_parallel_size=", "actor_rollout_ref.model.enable_gradient_checkpointing="
    found = {}
    for size, recomputed in ((1, "true"), (2, "true"), (4, "true"), (4, "false"), (1, "false")):
        config = configured(*SMALL, f"{keys[0]}{size}", f"{keys[1]}{recomputed}")
        parts = memory_plan(config, shape, four, "cpu").stages[1].parts
        found[size, recomputed] = parts["gathered layers"], parts["activations"]
    layer, root = shape.layer_parameters, shape.root_parameters
    rest = shape.largest_layer(0)
    assert rest == layer - 8 * expert // 4
    assert found[1, "true"][0] == 4 * (root + 2 * layer) + 12 * max(layer, root)
    without = 4 * (root + 2 * rest) + 12 * max(rest, root)
    assert found[2, "true"][0] == without + (8 + 3 * 4) * expert  # gradients of all, a group's, and two on their way
    assert found[4, "true"][0] == without + 2 * expert  # added where they are computed
    assert found[4, "false"][0] == without + 3 * 2 * expert  # those of three layers are kept
    row = 32 * 4 * 3 * 32  # of every token to three experts: as it has arrived, and a gradient on either side
    assert found[4, "true"][1] - found[1, "true"][1] == 3 * row
    assert found[4, "false"][1] - found[1, "false"][1] == (3 + 2) * row
    advice = build_plan(configured(*SMALL, f"{keys[0]}4"), "cpu", shape).advice
    assert any(note.startswith("4 groups of training GPUs share the 8 experts of a layer") for note in advice)


def test_one_process_on_a_cpu_by_hand() -> None:
    config = configured(*SMALL)
    stages = stages_of(config, ONE, "cpu")
    # a token of a layer: 4 bytes x (4 x 8 + 3 x 6 x 4 + 3 x 16 = 152) + 4 x (2 + 2 x 4 + 2) = 656, in passing
    # 4 x (4 x 8 + 2 x 16) = 256, streams of the layer that is recomputed 2 x 8 x 4 = 64: 976 a token
    # head: 3 x 32 x 8 x 4 = 3072, its gradient 4 x 10 x 8 = 320, logits 32 x 10 x 8 = 2560
    trainer = {"master weights": 6624, "moments": 13248}
    cache = 5 * 4 * 32 * 4
    assert stages["GPU", "update"].parts == trainer | {
        "gradients": 6624,
        "activations": 32 * 976 + 3072 + 320 + 2560,
        "rollout weights": 6624,
        "key-value cache": cache,  # on a CPU it stays
    }
    # a token: 4 x (4 x 8 + 2 x 8 x 4 + 3 x 16) = 576; a request: 3 x 4 x 10 of logits and 16 x 16 of state
    assert stages["GPU", "generation"].parts == trainer | {
        "rollout weights": 6624,
        "rollout workspace": 16 * 576 + 2 * (120 + 256),
        "key-value cache": cache,
    }
    assert stages["GPU", "generation"].elastic == 0


def test_without_recomputation_every_layer_keeps_its_own() -> None:
    config = configured(*SMALL, f"{MODEL}.enable_gradient_checkpointing=false", f"{ACTOR}.entropy_coeff=0.1")
    parts = stages_of(config, ONE, "cpu")["GPU", "update"].parts
    assert parts["activations"] == 32 * (2 * 656 + 256) + 3072 + 2560  # and an entropy term needs the general head


def test_two_colocated_gpus_by_hand() -> None:
    config = configured(*SMALL, f"{ACTOR}.use_kl_loss=true")
    stages = stages_of(config, TWO, "cuda")
    shared = {"master weights": 3312, "moments": 6624, "reference": 1656, "rollout weights": 3312}
    overhead = CONTEXT_BYTES + NCCL_BYTES
    update = stages["GPU", "update"].parts
    assert {name: update[name] for name in shared} == shared
    assert update["gradients"] == 3312
    # bf16: root and two layers 2 x (88 + 2 x 784); the gradient of a layer in bf16, and in fp32 sent and received
    assert update["gathered layers"] == 3312 + 10 * 784
    assert "key-value cache" not in update, "released while training"
    assert stages["GPU", "sync"].parts == shared | {"buckets": 2 * BUCKET_BYTES, "CUDA": overhead}
    assert stages["GPU", "generation"].parts["key-value cache"] == 5 * 4 * 32 * 2
    kept = stages_of(configured(*SMALL, f"{ROLLOUT}.free_cache_engine=false"), TWO, "cuda")
    assert kept["GPU", "update"].parts["key-value cache"] == 5 * 4 * 32 * 2


def test_offload_moves_weights_and_moments_to_the_machine() -> None:
    offload = (f"{ACTOR}.fsdp_config.param_offload=true", f"{ACTOR}.fsdp_config.optimizer_offload=true")
    plan = memory_plan(configured(*SMALL, *offload), TINY, TWO, "cuda")
    generation, update, sync = (stage.parts for stage in plan.stages)
    assert not {"master weights", "moments"} & (generation.keys() | sync.keys())
    assert update["master weights"] == 3312
    assert plan.host == 12 * 828
    assert memory_plan(configured(*SMALL, *offload), TINY, ONE, "cpu").host == 0
    beside = configured(*SMALL, *offload, f"{ACTOR}.checkpoint.async_save=true")
    assert memory_plan(beside, TINY, TWO, "cuda").host == 2 * 12 * 828, "a checkpoint on its way is another copy"


def test_gpus_apart_hold_one_side_each() -> None:
    config = configured(*SMALL, "trainer.rollout_gpus=1")
    config = with_value(config, "trainer.n_gpus_per_node", 4)
    placement = Placement.of(config)
    assert (placement, placement.total) == (Placement(3, 1, False), 4)
    stages = stages_of(config, placement, "cuda")
    assert stages["trainer GPU", "update"].parts["master weights"] == 4 * 552
    assert not {"rollout weights", "key-value cache"} & stages["trainer GPU", "update"].parts.keys()
    assert not {"master weights", "moments"} & stages["rollout GPU", "generation"].parts.keys()
    assert stages["rollout GPU", "sync"].parts["key-value cache"] == 5 * 4 * 32 * 2, "no trainer wants its room"


LENGTHS = ("data.max_prompt_length=512", "data.max_response_length=1024")


def shape(name: str) -> ModelShape:
    return ModelShape.of(SHAPES[name])


def test_an_elastic_cache_takes_its_share_of_what_is_there() -> None:
    config, model = configured(*LENGTHS, f"{ROLLOUT}.max_num_seqs=512"), shape("qwen3-1.7b")
    plan = memory_plan(config, model, ONE, "cuda", H100)
    generation, page = plan.stages[0], 64 * 2 * 28 * 8 * 128 * 2
    least = 24 * page  # a sequence of 1,536 tokens
    assert generation.parts["key-value cache"] == least
    share = int((H100 - (2 + 4) * model.num_parameters) * 0.5) // page * page  # beside weights of both sides
    assert generation.elastic == share - least
    assert plan.kv_cache_bytes == share
    all_of_it = with_value(config, f"{ROLLOUT}.gpu_memory_utilization", 1.0)
    plan = memory_plan(all_of_it, model, ONE, "cuda", H100)
    assert plan.kv_cache_bytes == H100 - (plan.stages[0].total - least)
    (note,) = memory_notes(all_of_it, model, Machine("cuda", 1, H100))
    assert "gpu_memory_utilization=1 would leave too little for generation" in note
    fitting = with_value(config, f"{ROLLOUT}.gpu_memory_utilization", float(note.rsplit(" ", 1)[1]))
    assert memory_notes(fitting, model, Machine("cuda", 1, H100)) == []


def test_a_model_that_cannot_fit_is_refused_with_the_setting_that_makes_room() -> None:
    config, machine = configured(*LENGTHS), Machine("cuda", 1, H100)
    assert memory_problems(config, shape("qwen3-1.7b"), machine) == []
    (problem,) = memory_problems(config, shape("qwen3-4b"), machine)
    assert (
        "update needs 82.7 GiB on each GPU and 78.5 GiB are free, 4.2 GiB too little (moments 30.0 GiB" in problem.what
    )
    keys = [text.split()[0].split("=") for text in problem.fix.removeprefix("set ").split(" or ")]
    named = {key.rsplit(".", 1)[1] for key, _ in keys}
    assert named == {"enable_sleep_mode", "optimizer_offload", "ppo_max_token_len_per_gpu"}
    for key, value in keys:  # each alone is enough
        changed = with_value(config, key, True if value == "true" else int(value))
        assert memory_problems(changed, shape("qwen3-4b"), machine) == []


def test_a_model_that_no_setting_makes_fit_gets_a_number_of_gpus() -> None:
    config, model = configured(*LENGTHS), shape("moonlight-16b-a3b")
    (problem,) = memory_problems(config, model, Machine("cuda", 1, H100))
    said, needed = problem.fix.removesuffix(", or a smaller model").split(" with ")
    assert said == "no setting makes room for it here: use 2 GPUs"
    two = with_value(config, "trainer.n_gpus_per_node", 2)
    for key, _, value in (text.partition("=") for text in needed.split(" and ")):
        two = with_value(two, key, True if value == "true" else int(value))
    assert two.actor.fsdp_config.optimizer_offload
    assert memory_problems(two, model, Machine("cuda", 2, H100)) == []
    (host,) = memory_problems(two, model, Machine("cuda", 2, H100, 16 * GIB))
    assert (
        "what is offloaded or copied takes 59.5 GiB per GPU of the machine's memory and 16.0 GiB are free" in host.what
    )


def test_several_settings_together_where_none_is_enough_alone() -> None:
    config = configured(*LENGTHS, f"{ACTOR}.ppo_max_token_len_per_gpu=65536", f"{ROLLOUT}.free_cache_engine=false")
    (problem,) = memory_problems(config, shape("qwen3-4b"), Machine("cuda", 1, 70 * GIB))
    settings = [text.split("=") for text in problem.fix.removeprefix("set ").split(" and ")]
    assert len(settings) > 1
    for key, value in settings:
        config = with_value(config, key, True if value == "true" else int(value))
    assert memory_problems(config, shape("qwen3-4b"), Machine("cuda", 1, 70 * GIB)) == []


def test_a_plan_that_barely_fits_says_so() -> None:
    config = configured(*LENGTHS, f"{ACTOR}.fsdp_config.optimizer_offload=true")
    needed = memory_plan(config, shape("qwen3-4b"), ONE, "cuda").worst().total
    (note, *_) = memory_notes(config, shape("qwen3-4b"), Machine("cuda", 1, int(needed * 1.05)))
    assert "memory is tight: update" in note
    assert not any("tight" in n for n in memory_notes(config, shape("qwen3-4b"), Machine("cuda", 1, needed * 2)))


def test_rows_name_every_stage_and_gpu() -> None:
    plan = memory_plan(configured(*LENGTHS), shape("qwen3-1.7b"), Placement(1, 1, False), "cuda", H100)
    rows = memory_rows(plan, H100)
    assert [name for name, _ in rows] == ["memory"] * 3
    assert re.match(r"update \d+\.\d GiB of 78.5 GiB on a trainer GPU: moments 12.8 GiB, ", rows[0][1])
    assert re.match(r"generation \d+\.\d GiB of 78.5 GiB on a rollout GPU: rollout weights 3.2 GiB, ", rows[1][1])
    assert "up to 37.5 GiB more of key-value cache" in rows[1][1]
    assert rows[2][1] == "19.2 GiB per trainer GPU in the machine's own while a resume reads its checkpoint"


@pytest.mark.parametrize("stage", ["start-up", "generation", "update", "sync", "any"])
def test_out_of_memory_advice_names_knobs_that_can_still_be_turned(stage: Any) -> None:
    advice = out_of_memory_advice(configured(*LENGTHS), stage)
    assert "optimizer_offload=true" in advice
    if stage in ("update", "any"):
        assert f"a lower {ACTOR}.ppo_max_token_len_per_gpu (now 16384, at least 1536)" in advice
    turned = configured(
        *LENGTHS,
        f"{ACTOR}.ppo_max_token_len_per_gpu=1536",
        f"{ACTOR}.fsdp_config.optimizer_offload=true",
        f"{ROLLOUT}.kv_cache_bytes=1000",
    )
    advice = out_of_memory_advice(turned, stage)
    assert "optimizer_offload" not in advice
    assert "ppo_max_token_len" not in advice
    assert "gpu_memory_utilization" not in advice
    if stage != "update":
        assert "kv_cache_bytes (now 1000)" in advice


def test_a_run_that_cannot_fit_this_machine_is_refused_before_it_loads(tmp_path: Path) -> None:
    wide = {"hidden_size": 1 << 16, "intermediate_size": 1 << 19}
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["qwen3-8b"] | wide))
    (tmp_path / "train.jsonl").touch()
    config = load_config([f"{MODEL}.path={tmp_path}", f"data.train_files={tmp_path}/train.jsonl", "trainer.device=cpu"])
    with pytest.raises(ConfigError, match=r"update needs \d+\.\d GiB on each process and .* no setting makes room"):
        check_settings(config, Layout(n_gpus_per_node=1, device="cpu", transport="local"))


def test_processes_of_a_machine_share_its_memory() -> None:
    one, four = (machine_of(Layout(1, count, "cpu", transport="local")).device_bytes for count in (1, 4))
    assert one is not None
    assert four == pytest.approx(one / 4, rel=0.2)
    config, model = configured("trainer.device=cpu"), shape("qwen3-8b")
    (problem,) = memory_problems(config, model, Machine("cpu", 4, GIB))
    assert problem.fix.endswith("; or start fewer than 4 processes, which share the machine's memory")
    (problem,) = memory_problems(config, model, Machine("cpu", 1, GIB))
    assert "fewer" not in problem.fix


def test_the_placement_counts_correctly() -> None:
    assert Placement(1, 2, False).text("cpu") == "1 process trains, 2 sample"
    assert Placement(2, 1, False).text("cuda") == "2 GPUs train, 1 samples"


def test_ranks_that_share_a_forward_hold_less_of_one_sequence() -> None:
    long = ("data.max_prompt_length=1024", "data.max_response_length=31744")
    config = configured(*long, f"{ACTOR}.ppo_max_token_len_per_gpu=32768")
    shared = configured(*long, f"{ACTOR}.ppo_max_token_len_per_gpu=8192", f"{ACTOR}.ulysses_sequence_parallel_size=4")
    four = Placement(4, 4, True)
    alone, together = (
        memory_plan(each, shape("qwen3-8b"), four, "cuda").stages[1].parts["activations"] for each in (config, shared)
    )
    assert together < 0.4 * alone
    advice = out_of_memory_advice(shared, "update")
    assert "ppo_max_token_len_per_gpu" not in advice, "it is as low as the longest sequence lets it be"


def test_gpus_for_the_rollout_leave_one_to_train() -> None:
    with pytest.raises(ConfigError, match=r"rollout_gpus=1 of 1 GPUs .* leaves none to train"):
        load_config(["trainer.rollout_gpus=1", "trainer.n_gpus_per_node=1"])
