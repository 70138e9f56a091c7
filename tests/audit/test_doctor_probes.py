"""The doctor's probes pass on the invariant operators and fail on planted faults."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vexact import env
from vexact.audit.doctor import model, probes
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


def test_a_sampler_that_rounds_logits_is_found(monkeypatch):
    monkeypatch.setattr(probes, "linear", lambda x, w, out_dtype: linear(x, w, out_dtype=out_dtype).bfloat16().float())
    result = probes.check_logprob("cpu", FP32)
    assert result.status == "error"
    assert "differ between sampler and trainer" in result.message


def test_a_failing_attention_probe_takes_exactness_away():
    lines = {result.name: result for result in probes.check_attention_impls(exact=False)}
    assert lines["attention triton-invariant"].status == "warning"
    assert len(lines) == len(env.ATTENTION)


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
