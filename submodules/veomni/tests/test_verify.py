"""`vexact verify --model_backend veomni`: 64 of 64 tokens, and not without each of the exchanged parts."""

import re

import pytest
import torch
from vexact_veomni import side
from vexact_veomni.convert import convert, kinds_of
from vexact_veomni.slots import SLOTS, bind, model_type_of, ops_implementation

from vexact import cli, plugins
from vexact.audit.verify import VerifyOptions, verify
from vexact.swaps import invariant

EXPERTS = ("qwen3_moe", "deepseek_v3")
WORK = {"num_prompts": 8, "max_new_tokens": 8}
PACKED_FUSED = ["--use_remove_padding", "true", "--use_fused_lce", "true"]
PADDED_PLAIN = ["--use_remove_padding", "false", "--use_fused_lce", "false"]


@pytest.mark.parametrize("layout", [PACKED_FUSED, PADDED_PLAIN], ids=["packed-fused", "padded-plain"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "odd", *EXPERTS])
def test_every_token_has_the_bits_that_the_rollout_sampled(checkpoints, capsys, family, dtype, layout):
    command = ["verify", "--model_path", str(checkpoints / family), "--model_backend", "veomni", "--device", "cpu"]
    command += ["--dtype", dtype, "--num_prompts", "8", "--max_new_tokens", "8", *layout]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "tokens matched       64 / 64 (100.00 %)" in table
    assert "log-probs different  0 / 128" in table
    assert re.search(r"logits different     0 / \d+", table)
    assert ("routes different     0 / 128 rows" in table) == (family in EXPERTS)
    assert "agrees with transformers: yes" in table or dtype == "bfloat16"


def test_the_backend_is_found_by_its_entry_point():
    assert plugins.load(plugins.VERIFY_BACKENDS, "veomni", "--model_backend", ("vexact", "hf")) is side.load_side


def without(part):
    """Builds a training side like ``load_side``, but with torch's own operator in one place."""
    missing = {part} | ({"table"} if part in ("rotary", "rotary_pos_emb") else set())  # those go together

    def load_side(path, dtype, device, attn_impl):
        slots = tuple(slot for slot in SLOTS if slot != part)
        attention = "sdpa" if part == "attention" else attn_impl
        kernels = ops_implementation(attention, slots, model_type=model_type_of(path))
        model = side.build(path, dtype, device, kernels)
        invariant.swap_modules(model, tuple(kind for kind in kinds_of(model) if kind not in missing))
        bind(model, "cross_entropy_loss", "eager" if part == "loss" else "vexact")
        if path.name == "qwen3_moe":
            bind(model, "moe_experts", "eager" if part == "moe_experts" else "vexact")
        return side.VeomniSide(model.eval())

    return load_side


@pytest.mark.parametrize(
    ("family", "part"),
    [
        *(("odd", part) for part in ("attention", "linear", "loss", *SLOTS)),
        *(("qwen3_moe", part) for part in ("attention", "linear", "loss", "router", "moe_experts", *SLOTS)),
        *(("deepseek_v3", part) for part in ("attention", "linear", "loss", "router", "norm", "mlp", "rotary")),
    ],
)
def test_without_one_part_bits_differ(checkpoints, monkeypatch, family, part):
    monkeypatch.setattr(side, "load_side", without(part))
    dtype = "float32" if "norm" in part else "bfloat16"  # which rounds most sums of squares to the same
    report = verify(VerifyOptions(checkpoints / family, model_backend="veomni", dtype=dtype, **WORK))
    assert report.bits.logprobs_different > 0
    assert (report.bits.logits_different > 0) == (part != "loss"), "the loss slot is the fused head alone"
    assert not report.passed


@pytest.mark.parametrize("slot", SLOTS)
def test_a_slot_that_is_not_ours_is_refused_by_name(checkpoints, slot):
    slots = tuple(one for one in SLOTS if one != slot)
    model = side.build(checkpoints / "qwen3", torch.float32, torch.device("cpu"), ops_implementation(slots=slots))
    with pytest.raises(
        ValueError, match=f"Qwen3ForCausalLM cannot be made exact: its slot {slot} is not bound to vexact"
    ):
        convert(model)


def test_another_attention_is_refused_by_name(checkpoints, monkeypatch):
    monkeypatch.setenv("VEOMNI_ATTN_IMPLEMENTATION", "sdpa")
    model = side.build(checkpoints / "qwen3", torch.float32, torch.device("cpu"), ops_implementation())
    with pytest.raises(ValueError, match="its attention is sdpa; set VEOMNI_ATTN_IMPLEMENTATION=triton-invariant"):
        convert(model)
    monkeypatch.delenv("VEOMNI_ATTN_IMPLEMENTATION")
    assert ops_implementation().attn_implementation == "triton-invariant"


def test_stock_attention_is_compared_all_the_same(checkpoints, capsys):
    command = ["verify", "--model_path", str(checkpoints / "llama"), "--model_backend", "veomni", "--device", "cpu"]
    assert cli.main([*command, "--attn_impl", "sdpa", "--num_prompts", "4", "--max_new_tokens", "4"]) == 1
    assert "only triton-invariant is the attention of the rollout" in capsys.readouterr().out
