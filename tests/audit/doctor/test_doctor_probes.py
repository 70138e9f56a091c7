"""The doctor's probes pass on the invariant operators and fail on planted faults."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from vexact.attention import ATTENTION
from vexact.audit.doctor import model, model_probes, probes
from vexact.audit.doctor.report import attempt, probe_checks
from vexact.models import ModelConfig, load_model, random_model, save_hf
from vexact.ops import linear
from vexact.ops.kernels import linear as linear_kernels

FP32 = torch.float32


def test_every_probe_is_ok_here():
    results = list(probe_checks("cpu"))
    assert [str(result) for result in results if result.status != "ok"] == []
    text = "\n".join(map(str, results))
    assert "attention triton-invariant: exact here" in text
    assert "attention sdpa: available, not exact" in text
    assert "attention fa-invariant: absent: " in text
    assert "stock linear fp32" in text


def test_a_product_that_depends_on_the_batch_is_found(monkeypatch):
    def split_by_rows(x, weight, **kwargs):
        half = x.shape[1] // 2 if x.shape[0] < 8 else x.shape[1]
        return F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:])

    monkeypatch.setattr(probes, "linear", split_by_rows)
    result = probes.check_linear("cpu", FP32)
    assert result.status == "error"
    assert "rows change with the number of rows" in result.message


def test_a_tile_that_splits_k_is_found(monkeypatch):
    def matmul(a, b, out, *, layout, tile=None):
        exact = tile != "split"
        return out.copy_(linear(a, b) if exact else linear(a[:, :96], b[:, :96]) + linear(a[:, 96:], b[:, 96:]))

    monkeypatch.setattr(linear_kernels, "matmul", matmul)
    assert probes.check_tiles("cpu", FP32, ["one", "two"]).message == "2 tiles give the same bits"
    result = probes.check_tiles("cpu", FP32, ["one", "split", "two"])
    assert (result.status, result.message) == ("error", "1 of 3 tiles give other bits, the first is split")
    assert len(probes.all_tiles(torch.bfloat16)) > 20 > len(probes.all_tiles(FP32)) > 0


def test_another_softmax_order_in_decoding_is_found(monkeypatch):
    exact = probes.paged_attention("cpu", FP32)
    monkeypatch.setattr(probes, "paged_attention", lambda device, dtype, heads: exact.nextafter(torch.tensor(9.0)))
    result = probes.check_attention_bits("cpu", FP32)
    assert result.status == "error"
    assert "differ between packed and paged" in result.message


def test_keys_wider_than_values_are_probed(monkeypatch):
    heads = probes.Heads(4, 4, 24, 16)
    result = probes.check_attention_bits("cpu", FP32, heads)
    assert result.status == "ok"
    assert "4 heads over 4 of 24 (values 16)" in result.message
    exact = probes.paged_attention("cpu", FP32, heads)
    assert exact.shape[1:] == (4, 16)
    monkeypatch.setattr(probes, "paged_attention", lambda device, dtype, heads: exact.nextafter(torch.tensor(9.0)))
    assert probes.check_attention_bits("cpu", FP32, heads).status == "error"


def test_a_sampler_that_rounds_logits_is_found(monkeypatch):
    monkeypatch.setattr(probes, "linear", lambda x, w, out_dtype: linear(x, w, out_dtype=out_dtype).bfloat16().float())
    result = probes.check_logprob("cpu", FP32)
    assert result.status == "error"
    assert "differ between sampler and trainer" in result.message


def test_a_failing_attention_probe_takes_exactness_away():
    lines = {result.name: result for result in probes.check_attention_impls(exact=False)}
    assert lines["attention triton-invariant"].status == "warning"
    assert len(lines) == len(ATTENTION)


def test_what_a_probe_raises_is_an_error_line():
    def broken():
        raise RuntimeError("PTX assembly\naborted")

    result = attempt("probe linear", broken)
    assert (result.status, result.message) == ("error", "RuntimeError: PTX assembly aborted")


def test_the_guard_line_names_a_stock_operator():
    result = model.check_guard("cpu", lambda config, **kwargs: random_model(config, ops="stock", **kwargs))
    assert result.status == "error"
    assert "outside vexact.ops, the first: aten." in result.message


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("doctor_model")
    config = ModelConfig.from_hf_dict(model._TINY)
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    return path


def test_a_good_checkpoint(checkpoint):
    result = model.check_model(str(checkpoint))
    assert result.status == "ok"
    assert "Qwen3ForCausalLM" in result.message
    count = sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
    assert model.check_tokenizer(str(checkpoint)).status == "warning"
    memory = {factor: model.check_model_memory(str(checkpoint), "cpu", count * factor) for factor in (19, 22, 30)}
    assert [result.status for result in memory.values()] == ["error", "warning", "ok"]


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda path: (path / "config.json").unlink(), "config.json"),
        (lambda path: (path / "config.json").write_text("{"), ""),
        (lambda path: (path / "config.json").write_text('{"architectures": ["BertModel"]}'), "BertModel"),
        (lambda path: (path / "model.safetensors").unlink(), "no weights"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0broken"), ""),
    ],
)
def test_a_bad_checkpoint_is_an_error(checkpoint, tmp_path, spoil, part):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    spoil(tmp_path)
    result = model.check_model(str(tmp_path))
    assert result.status == "error"
    assert part in result.message


def test_the_shapes_of_a_model_are_probed(checkpoint):
    results = list(model_probes.model_probe_checks(str(checkpoint), "cpu"))
    assert [result.status for result in results] == ["ok"] * 3
    text = "\n".join(map(str, results))
    assert "128 x 32, 32 x 64, 96 x 32, 32 x 48, 64 x 32" in text
    assert "4 heads over 2 of 16" in text


def test_large_sizes_are_cut_where_they_repeat(checkpoint):
    config = dataclasses.replace(
        ModelConfig.from_hf_dir(checkpoint), vocab_size=151_937, intermediate_size=3000, num_heads=32, num_kv_heads=8
    )
    shapes = model_probes.Shapes.of(config)
    assert shapes.products["gate and up"] == (1024 + 6000 % 1024, 32)
    assert shapes.products["down"] == (32, 3000)  # what is summed is never cut
    assert shapes.vocab_size == 1024 + 151_937 % 1024
    assert shapes.heads == (8, 2, 16, 16)


@pytest.mark.parametrize(
    ("name", "line"),
    [("linear", "model linear fp32"), ("paged_attention", "model attention"), ("token_logprobs", "model logprob")],
)
def test_a_fault_at_the_shapes_of_the_model_alone_is_found(checkpoint, monkeypatch, name, line):
    """Each operator is right but for small inputs of the model's width."""
    if name == "linear":
        monkeypatch.setattr(
            model_probes, "linear", lambda x, w: linear(x, w) * (1 + 1e-6 * (x.shape[0] < 5 and w.shape[1] == 48))
        )
    elif name == "paged_attention":
        exact = probes.paged_attention
        monkeypatch.setattr(
            probes, name, lambda device, dtype, heads: exact(device, dtype, heads) * (1 + 1e-6 * (heads.dim == 16))
        )
    else:
        exact = probes.token_logprobs
        monkeypatch.setattr(
            probes,
            name,
            lambda logits, *rest: exact(
                logits + 1e-3 * (len(logits) == 1 and logits.shape[1] == 64) * torch.arange(64), *rest
            ),
        )
    found = [
        str(result) for result in model_probes.model_probe_checks(str(checkpoint), "cpu") if result.status == "error"
    ]
    assert len(found) == 1
    assert line in found[0]
    if name == "linear":
        assert "down (32 x 48), 1 rows" in found[0]
