"""``vexact verify`` on checkpoints with experts and latent attention: bits, routes and gradients of both backends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import EXPERTS, build
from moe_configs import FAMILIES, with_router_biases

import vexact.ops as invariant
from vexact.audit.explain import checkpoint as explain_checkpoint
from vexact.audit.explain.checkpoint import explain_report
from vexact.audit.verify import VerifyOptions, run, verify
from vexact.audit.verify.gradients import compare_named
from vexact.audit.verify.routes import RouteTap, layer_of
from vexact.cli import main
from vexact.models import ModelConfig, load_model, random_model, save_hf

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
SMALL: dict[str, Any] = {"num_prompts": 4, "max_new_tokens": 5}


def checkpoint(path: Path, family: str, **changes: object) -> Path:
    # torch's grouped product asks for rows of whole 16 bytes
    raw = FAMILIES[family] | {"num_hidden_layers": 2, "hidden_size": 64} | changes
    if "moe_intermediate_size" in raw:
        raw["moe_intermediate_size"] = 24
    config = ModelConfig.from_hf_dict(raw)
    save_hf(with_router_biases(random_model(config, seed=3)).named_parameters(), config, path)
    return path


def test_a_model_that_transformers_fails_to_compute_is_named(tmp_path, capsys):
    """Its router of DeepSeek-V3 asks every group for two experts."""
    path = checkpoint(tmp_path, "moonlight", n_routed_experts=1, num_experts_per_tok=1)
    assert main(["verify", f"--model_path={path}", "--device=cpu", "--num_prompts=2", "--max_new_tokens=2"]) == 2
    said = capsys.readouterr().err
    assert "fails to compute with it" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("family", "backend", "more"),
    [
        ("qwen3-moe", "vexact", {"dtype": "bfloat16"}),
        ("qwen3-moe", "hf", {"dtype": "bfloat16"}),
        ("deepseek-v3", "vexact", {"use_remove_padding": False, "use_fused_lce": False}),
        ("deepseek-v3", "hf", {"dtype": "bfloat16"}),
        ("deepseek-v2-lite", "hf", {}),
        ("mixtral", "hf", {}),
    ],
)
def test_bits_routes_and_gradients(tmp_path: Path, family: str, backend: str, more: dict[str, Any]) -> None:
    report = verify(VerifyOptions(checkpoint(tmp_path, family), model_backend=backend, **SMALL | more))
    assert report.passed, report.table()
    bits = json.loads(json.dumps(report.to_dict()))["bits"]
    assert bits["routes_compared"] == bits["logprobs_compared"] == 40
    assert bits["routes_different"] == bits["routes_missing"] == 0
    assert bits["first_route"] is None
    assert "0 / 40 rows went to other experts in some layer" in report.table()
    gradients = report.native.same.gradients
    assert gradients.experts > 0
    if "dtype" not in more:
        assert gradients.min_cosine > 0.999, gradients


def test_a_model_that_our_engine_does_not_run_has_routes_too(tmp_path: Path) -> None:
    more = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    build("glm4_moe", **EXPERTS | more).save_pretrained(tmp_path)
    report = verify(VerifyOptions(tmp_path, model_backend="hf", **SMALL))
    assert (report.passed, report.rollout, report.bits.routes_compared) == (True, "model", 40), report.table()


def test_routes_that_differ_are_counted_named_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rollout's last router never chooses expert 0."""

    def planted(*args: Any, **kwargs: Any) -> Any:
        model = load_model(*args, **kwargs)
        router = model.layers[-1].mlp.router

        def without_first(logits: torch.Tensor, *rest: Any, **settings: Any) -> Any:
            return invariant.route(logits - 1e9 * (torch.arange(logits.shape[1]) == 0), *rest, **settings)

        router.ops = dataclasses.replace(router.ops, route=without_first)
        return model

    options = VerifyOptions(checkpoint(tmp_path, "qwen3-moe"), **SMALL)
    monkeypatch.setattr(run, "load_model", planted)
    report = verify(options)
    assert not report.passed
    assert 0 < report.bits.routes_different < 40
    first = report.bits.first_route
    assert first is not None
    assert first.describe() in report.table()
    assert (first.request_id, first.position) in report.bits.unmatched
    monkeypatch.setattr(
        explain_checkpoint, "load_model", lambda *a, **k: load_model(*a, **k) if "attn_impl" in k else planted(*a, **k)
    )
    found = explain_report(options, report)
    assert found is not None
    assert (found.stage, found.layer) == ("route", 1)
    assert "router logits equal" in found.summary


def test_routes_alone_make_a_report_inexact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RouteTap, "digests", property(lambda self: self._digests + 1))
    report = verify(VerifyOptions(checkpoint(tmp_path, "qwen3-moe"), **SMALL))
    assert (report.bits.logits_different, report.bits.routes_different) == (0, 40)
    assert report.table().endswith("NOT EXACT: 20 of 20 tokens differ")


def test_a_side_that_does_not_say_its_routes_is_not_called_different(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RouteTap, "digests", None)
    report = verify(VerifyOptions(checkpoint(tmp_path, "qwen3-moe"), **SMALL))
    assert (report.passed, report.bits.routes_compared, report.bits.routes_missing) == (True, 0, 40)
    assert "not compared: the training side does not say which experts it chose" in report.table()


def test_experts_with_and_without_tokens() -> None:
    """(3, 2) gradients: expert 0 has tokens, 1 has none, 2 has some and gets nothing."""
    ours = {f"model.layers.4.mlp.experts.{name}": torch.zeros(3, 2) for name in ("gate_up_proj", "down_proj")}
    theirs = {name: torch.ones(3, 2) * torch.tensor([[1.0], [0.0], [1.0]]) for name in ours}
    loads = {4: torch.tensor([5, 0, 2])}
    for gradient in ours.values():
        gradient[0] = 1
    found = compare_named(ours, theirs, loads)
    assert found.zero == [f"{name}[2]" for name in ours]
    assert (found.experts, found.idle_experts, found.stray, found.usable) == (3, 1, [], False)
    for gradient in ours.values():
        gradient[2] = 1
    assert compare_named(ours, theirs, loads).usable
    ours["model.layers.4.mlp.experts.down_proj"][1, 1] = 1e-30
    found = compare_named(ours, theirs, loads)
    assert (found.stray, found.usable) == (["model.layers.4.mlp.experts.down_proj[1]"], False)
    for name, gradient in ours.items():
        gradient.zero_()
        assert name in compare_named(ours, theirs, loads).zero


def test_what_decides_nothing_has_no_gradient_on_either_side() -> None:
    ours = {"a": torch.zeros(2), "b": torch.ones(2), "c": torch.zeros(2)}
    theirs = {"a": torch.full((2,), 1e-9), "b": torch.ones(2), "c": torch.full((2,), 1e-3)}
    found = compare_named(ours, theirs)
    assert (found.without_effect, found.zero, found.usable, found.min_cosine_parameter) == (["a"], ["c"], False, "c")
    ours["c"] += 1e-3
    found = compare_named(ours, theirs)
    assert (found.usable, found.min_cosine_parameter) == (True, "b")
    nothing = {name: torch.zeros(2) for name in ours}
    assert compare_named(nothing, nothing).zero == list(ours)  # a backward that did not happen


def test_the_router_of_a_single_expert_passes(tmp_path: Path) -> None:
    """Its weight is one whatever it scores."""
    one = checkpoint(tmp_path, "qwen3-moe", num_experts=1, num_experts_per_tok=1)
    report = verify(VerifyOptions(one, **SMALL))
    assert report.passed
    routers = [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    assert report.native.same.gradients.without_effect == routers
    assert f"but for {', '.join(routers)}: zero on both sides" in report.table()


def test_a_tap_counts_what_the_routers_chose() -> None:
    model = random_model(ModelConfig.from_hf_dict(FAMILIES["qwen3-moe"]), seed=3)
    tap, digest = RouteTap(model), torch.zeros(30, dtype=torch.int64)
    for _ in range(2):
        digest.zero_()
        model(torch.arange(30), torch.arange(30), invariant.PackedMetadata.from_lengths([30]), route_digest=digest)
    assert tap.digests is not None
    assert torch.equal(tap.digests, digest), "of the last forward"
    assert {layer: int(load.sum()) for layer, load in tap.loads.items()} == dict.fromkeys(range(3), 2 * 30 * 3)
    tap.forget()
    assert not tap.loads
    assert layer_of("layers.3.mlp.router") == layer_of("model.layers.3.mlp.gate") == 3
