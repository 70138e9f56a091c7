"""``vexact verify --model_backend hf`` for models that our engine does not define: exact, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import build
from torch import nn

from vexact.audit.verify.run import VerifyOptions, verify
from vexact.audit.verify.sides import HfSide
from vexact.training.batches.batch import TokenSequence, pack_tokens

pytestmark = pytest.mark.filterwarnings("ignore")


def options(path: Path, kind: str, changes: dict[str, object], **more: object) -> VerifyOptions:
    build(kind, **changes).save_pretrained(path)
    return VerifyOptions(path, **{"model_backend": "hf", "num_prompts": 5, "max_new_tokens": 6} | more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "changes", "more"),
    [
        ("mistral", {"sliding_window": None}, {"dtype": "bfloat16"}),
        ("gemma3_text", {}, {"use_remove_padding": False}),
        ("granite", {"logits_scaling": 3.0}, {"use_fused_lce": False}),
    ],
)
def test_decoding_from_the_key_cache_has_the_bits_of_training(
    tmp_path: Path, kind: str, changes: dict[str, object], more: dict[str, object]
) -> None:
    report = verify(options(tmp_path, kind, changes, **more))
    assert report.passed, report.table()
    assert report.bits.tokens == report.bits.draws_repeated == 30
    assert report.native.cosine > 0.99, "each gradient is that of the stock model"
    assert (
        "the same model from its key cache, 3 lengths of prompt pieces (our engine does not run it)" in report.table()
    )
    assert json.loads(json.dumps(report.to_dict()))["rollout"] == "model"


def test_stock_attention_is_found_to_differ(tmp_path: Path) -> None:
    report = verify(options(tmp_path, "olmo2", {}, attn_impl="sdpa", dtype="bfloat16"))
    assert not report.passed
    assert len(report.bits.unmatched) > 20


@pytest.mark.parametrize(
    ("kind", "changes", "more", "named"),
    [
        ("granite", {"logits_scaling": 3.0}, {}, "GraniteForCausalLM changes the logits of its head, .*_lce false"),
        (
            "stablelm",
            {"hidden_size": 64, "head_dim": 16},
            {},
            r"input_layernorm \(LayerNorm\) computes aten.native_layer_norm",
        ),
        ("stablelm", {"hidden_size": 60}, {}, "as it is, it cannot run 12 tokens: "),
        ("mistral", {"sliding_window": 9}, {}, "sliding_window=9 is shorter than a sequence of"),
        ("mistral", {"max_position_embeddings": 12}, {"max_new_tokens": 12}, "leaves no room for a prompt"),
    ],
)
def test_what_cannot_be_verified_is_named(
    tmp_path: Path, kind: str, changes: dict[str, object], more: dict[str, object], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        verify(options(tmp_path, kind, changes, **more))


def test_another_training_side_still_needs_a_model_of_ours(tmp_path: Path) -> None:
    build("mistral").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="MistralForCausalLM"):
        verify(VerifyOptions(tmp_path, model_backend="vexact"))


def test_a_head_with_a_bias_is_not_fused() -> None:
    model = build("llama")
    model.lm_head = nn.Linear(60, 97)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has a bias in its head, .*; use --use_fused_lce false"):
        HfSide(model).logprobs(pack_tokens([TokenSequence([1, 2], [3, 4])], torch.device("cpu")))
