"""The command on tiny checkpoints of two families: passes when exact, fails by exit code and name when not."""

import dataclasses
import json
import re
from functools import partial

import numpy as np
import pytest
import torch
from audit_support import SHAPE

from vexact import cli
from vexact.audit.verify import VerifyOptions, bits, run, verify
from vexact.audit.verify.bits import BitTally
from vexact.audit.verify.gradients import compare_named
from vexact.audit.verify.sides import HfSide, VexactSide, load_hf, pack_padded
from vexact.audit.verify.workload import rounds
from vexact.models import ModelConfig, load_model, random_model, save_hf
from vexact.ops import token_logprobs
from vexact.rollout import Engine
from vexact.rollout.sampling import sampler
from vexact.training.batches.batch import TokenSequence, pack_tokens

FAMILIES = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False},
    "padded": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "tie_word_embeddings": True,
        "vocab_size": 5,
        "pad_token_id": 3,  # in a vocabulary this small every prompt has it
    },
}
SMALL = ["--num_prompts", "6", "--max_new_tokens", "5", "--device", "cpu"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("verify")
    for family, changes in FAMILIES.items():
        config = ModelConfig.from_hf_dict(SHAPE | changes)
        save_hf(random_model(config, seed=3).named_parameters(), config, root / family)
    return root


def _plant(model, **operators):
    changed = dataclasses.replace(model.ops, **operators)
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = changed
    return model


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen3", ["--dtype", "bfloat16"]),
        ("llama", ["--use_remove_padding", "false", "--use_fused_lce", "false"]),
    ],
)
def test_an_exact_checkpoint_passes(checkpoints, tmp_path, capsys, family, more):
    out = tmp_path / "verify.json"
    assert cli.main(["verify", "--model_path", str(checkpoints / family), *SMALL, "--out", str(out), *more]) == 0
    report = json.loads(out.read_text())
    bits = report["bits"]
    assert report["passed"]
    assert bits["tokens"] == bits["tokens_matched"] == 30
    assert bits["logprobs_compared"] == 60
    assert bits["logits_compared"] == 30 * 61 * (1 if "bfloat16" in more else 2)
    assert bits["logprobs_different"] == bits["logits_different"] == bits["max_abs_logit_diff"] == 0
    assert report["native"]["closeness"]["positions"] == 30
    assert report["native"]["closeness"]["argmax_agreement"] > 0.9
    assert report["native"]["gradients"]["min_cosine"] > 0.99
    assert 0.98 < report["native"]["gradients"]["relative_norm"] < 1.02
    assert (report["yardstick"] is not None) == ("bfloat16" in more)
    assert report["environment"]["versions"]["torch"]
    assert report["environment"]["tile_table"]
    assert report["scheduling"]["rounds"] == 3
    table = capsys.readouterr().out
    assert "30 / 30 (100.00 %)" in table
    assert table.endswith("EXACT: all 30 tokens have the same bits on both sides\n")


def _linear_with_other_order(x, weight, bias=None, *, out_dtype=None):
    half = x.shape[1] // 2
    out = x[:, :half].float() @ weight[:, :half].float().T + x[:, half:].float() @ weight[:, half:].float().T
    return (out if bias is None else out + bias).to(out_dtype or x.dtype)


def test_a_planted_fault_makes_the_exit_code_1_and_is_named(checkpoints, tmp_path, monkeypatch, capsys):
    """Another K order in the rollout's linear only; the training side is loaded elsewhere."""
    monkeypatch.setattr(run, "load_model", lambda *a, **k: _plant(load_model(*a, **k), linear=_linear_with_other_order))
    out = tmp_path / "verify.json"
    assert cli.main(["verify", "--model_path", str(checkpoints / "qwen3"), *SMALL, "--out", str(out)]) == 1
    table = capsys.readouterr().out
    assert "NOT EXACT: " in table
    report = json.loads(out.read_text())
    bits = report["bits"]
    assert not report["passed"]
    assert bits["tokens_matched"] < bits["tokens"] == 30
    first = bits["first_logprob"]
    assert first["rollout"] != first["trainer"]
    assert first["ulp"] >= 1
    where = f"request {first['request_id']}, response position {first['position']}, token {first['token_id']}"
    assert f"{where}: rollout {first['rollout']!r}, training {first['trainer']!r}" in table
    assert bits["first_logit"]["rollout"] != bits["first_logit"]["trainer"]
    assert 0 < bits["max_abs_logit_diff"] < 1e-3
    assert report["native"]["closeness"]["argmax_agreement"] > 0.9, "the training side is sound"


def test_a_fault_in_the_fused_head_alone_is_found(checkpoints, monkeypatch):
    fused = VexactSide.logprobs
    monkeypatch.setattr(VexactSide, "logprobs", lambda self, batch: torch.nextafter(fused(self, batch), torch.ones(())))
    options = VerifyOptions(checkpoints / "qwen3", num_prompts=2, max_new_tokens=3)
    report = verify(options)
    assert not report.passed
    assert (report.bits.logprobs_different, report.bits.logits_different) == (6, 0)
    assert report.bits.max_ulp == 1
    assert verify(dataclasses.replace(options, use_fused_lce=False)).passed


def test_stock_transformers_is_close_but_said_to_differ(checkpoints, capsys):
    arguments = ["--model_backend", "hf", "--attn_impl", "sdpa", *SMALL]
    assert cli.main(["verify", "--model_path", str(checkpoints / "llama"), *arguments]) == 1
    table = capsys.readouterr().out
    assert "first different logit" in table
    assert "only triton-invariant is the attention of the rollout" in table


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen3", ["--dtype", "bfloat16"]),
        ("llama", ["--use_remove_padding", "false", "--use_fused_lce", "false"]),
        ("padded", ["--dtype", "float32"]),
    ],
)
def test_transformers_made_invariant_is_exact(checkpoints, capsys, family, more):
    arguments = ["--model_backend", "hf", *SMALL, *more]
    assert cli.main(["verify", "--model_path", str(checkpoints / family), *arguments]) == 0
    table = capsys.readouterr().out
    assert "30 / 30 (100.00 %)" in table
    assert "agrees with transformers: yes" in table or "bfloat16" in more


@pytest.mark.parametrize("backend", ["vexact", "hf"])
def test_the_pad_row_gets_the_gradient_that_transformers_gives_it(checkpoints, capsys, tmp_path, backend):
    """Every prompt has the pad token, whose row no gradient of the embedding reaches."""
    out = tmp_path / "verify.json"
    arguments = ["--model_backend", backend, "--out", str(out), *SMALL]
    assert cli.main(["verify", "--model_path", str(checkpoints / "padded"), *arguments]) == 0
    assert "agrees with transformers: yes" in capsys.readouterr().out
    assert json.loads(out.read_text())["native"]["gradients"]["min_cosine"] > 0.9999


def test_padded_and_packed_layouts_of_both_backends_agree(checkpoints):
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(rng.integers(0, 61, n).tolist(), rng.integers(0, 61, r).tolist())
        for n, r in ((5, 3), (33, 1), (1, 9))
    ]
    packed, padded = pack_tokens(sequences), pack_padded(sequences, torch.device("cpu"))
    assert padded.input_ids.numel() == 3 * 33
    path = checkpoints / "llama"
    ours = VexactSide(load_model(path))
    theirs = HfSide(load_hf(path, torch.float32, torch.device("cpu"), "sdpa"))
    with torch.no_grad():
        assert torch.equal(ours.logits(packed), ours.logits(padded))
        assert torch.equal(ours.logprobs(packed), ours.logprobs(padded))
        for batch in (packed, padded):
            torch.testing.assert_close(ours.logits(batch), theirs.logits(batch), rtol=1e-4, atol=1e-4)


def test_the_workload_crosses_edges_shares_prefixes_and_varies_the_engine():
    drawn = list(
        rounds(
            num_prompts=64,
            max_new_tokens=64,
            max_model_len=4096,
            vocab_size=61,
            tokenizer=None,
            on_gpu=True,
            seed=1,
        )
    )
    prompts = [prompt for one in drawn for prompt in one.prompts]
    assert len(prompts) == 64
    assert {15, 16, 17, 63, 64, 65, 127, 128, 129, 2047, 2048, 2049} <= {len(prompt) for prompt in prompts}
    shared = sum(a is not b and a[:8] == b[:8] for one in drawn for a in one.prompts for b in one.prompts)
    assert shared > 20
    assert len({tuple(sorted(one.engine.items())) for one in drawn}) == len(drawn) == 4
    page_sizes = [one.engine["page_size"] for one in drawn]
    assert page_sizes[0::2] == [64, 64], "every page size costs a GPU half a minute of compilation"
    assert page_sizes[1] == page_sizes[3] != 64
    params = [param for one in drawn for param in one.params]
    assert len({param.temperature for param in params}) == 4
    assert {param.top_k > 0 for param in params} == {param.top_p < 1 for param in params} == {True, False}


def test_gradients_that_are_missing_or_not_numbers_are_named():
    good = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0]), "c": torch.tensor([1.0])}
    result = compare_named(good | {"b": torch.tensor([float("nan")]), "c": torch.zeros(1)}, good)
    assert (result.non_finite, result.zero, result.usable) == (["b"], ["c"], False)
    assert compare_named({"a": -good["a"]}, {"a": good["a"]}).min_cosine == pytest.approx(-1)
    with pytest.raises(ValueError, match="different parameters, among them b"):
        compare_named({"a": good["a"]}, {"a": good["a"], "b": good["b"]})


@pytest.mark.parametrize("fault", [False, True])
def test_samples_that_are_drawn_again_unobserved_are_compared_too(checkpoints, monkeypatch, fault):
    generate, drawn = Engine.generate, []

    def noted(self, *args):
        samples = generate(self, *args)
        drawn.append([sample.token_ids for sample in samples])
        if fault and len(drawn) == 2:
            wrong = np.nextafter(samples[0].logprobs, np.float32(1))
            samples[0] = dataclasses.replace(samples[0], logprobs=wrong)
        return samples

    monkeypatch.setattr(Engine, "generate", noted)
    options = VerifyOptions(checkpoints / "qwen3", num_prompts=4, max_new_tokens=3)
    one_round = next(run.rounds_of(options, ModelConfig.from_hf_dir(checkpoints / "qwen3")))
    model, side = (load_model(checkpoints / "qwen3") for _ in range(2))
    tally = BitTally()
    bits.compare_round(
        partial(Engine, model=model),
        VexactSide(side),
        one_round,
        device=torch.device("cpu"),
        fused=True,
        padded=False,
        unobserved=True,
        seed=0,
        tally=tally,
    )
    assert drawn[0] == drawn[1]
    assert tally.logprobs_different == (3 if fault else 0)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"position": -1}, {"top_k": 1}, {"temperature": 0.2}],
    ids=lambda change: next(iter(change)),
)
def test_a_sampler_that_draws_otherwise_fails_although_every_log_probability_is_true(
    checkpoints, monkeypatch, capsys, change
):
    """Seed and position move the noise, one more kept token moves the threshold, another temperature moves both."""

    def shifted(logits, params):
        ((name, by),) = change.items()
        values = getattr(params, name)
        wrong = sampler.sample_as_it_is(logits, params._replace(**{name: values + by * (values > 0).to(values.dtype)}))
        right = wrong.logprobs
        if name == "temperature":
            inverse = torch.where(params.temperature > 0, 1 / params.temperature, 1.0)
            right = token_logprobs(logits, wrong.token_ids, inverse, wrong.min_logit).logprobs
        return wrong._replace(logprobs=right)

    monkeypatch.setattr(sampler, "sample_as_it_is", sampler.sample, raising=False)
    monkeypatch.setattr(sampler, "sample", shifted)
    assert cli.main(["verify", "--model_path", str(checkpoints / "qwen3"), "--num_prompts", "24", *SMALL[2:]]) == 1
    out = capsys.readouterr().out
    assert re.search(r"log-probs different +0 /", out)
    assert re.search(
        r"first different draw +request verify/\d+, response position \d: sampled \d+, drawn again \d+", out
    )
    assert "NOT EXACT" in out


def test_nothing_compared_is_not_exact():
    assert not BitTally().exact
    compared = {"logprobs_compared": 8, "logits_compared": 40, "draws_repeated": 4}
    assert BitTally(tokens=4, **compared).exact
    for name in compared:
        assert not BitTally(tokens=4, **{**compared, name: 0}).exact
        assert not BitTally(tokens=4, **{**compared, name: 3}).exact


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model_backend", "veomni"],
            "--model_backend=veomni: no installed package provides it",
        ),
        (["--model_backend", "mlx"], "--model_backend=mlx: no installed package provides it; there is vexact, hf"),
        (["--attn_impl", "flash"], "--attn_impl=flash: use one of triton-invariant, sdpa"),
        (["--dtype", "float8"], "--dtype=float8: use one of float32, bfloat16, float16"),
        (["--num_prompts", "0"], "--num_prompts=0 must be at least 1"),
        (["--max_new_tokens", "256"], "--max_new_tokens=256 leaves no room for a prompt: the model has 256 positions"),
        (["--out", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["--out", "{model}/config.json"], "config.json is there and is no result of vexact verify"),
        (["--out", "{model}"], "is a directory; give a file in it"),
        (["--explain", "{model}/model.safetensors"], "model.safetensors is there and is no replay file"),
    ],
)
def test_what_cannot_be_done_is_refused(checkpoints, capsys, arguments, message):
    model = checkpoints / "llama"
    given = [argument.format(model=model) for argument in arguments]
    assert cli.main(["verify", "--model_path", str(model), "--device", "cpu", *given]) == 2
    assert message in capsys.readouterr().err
