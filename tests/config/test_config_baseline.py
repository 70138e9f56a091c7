"""The attention of the stock rollout is named, and never another under its name."""

from __future__ import annotations

import pytest

from vexact.config import baseline
from vexact.config.baseline import baseline_attention

TORCH = "torch 2.11.0 has no paged attention, and the package flash_attn is not installed"


@pytest.mark.parametrize(
    ("installed", "asked", "device", "dtype", "widths", "expected"),
    [
        ("", "triton-invariant", "cuda", "bfloat16", (128, 128), f"triton-invariant ({TORCH})"),
        ("torch 2.13.0", "triton-invariant", "cuda", "bfloat16", (128, 128), "flash_attention_2 (torch 2.13.0"),
        ("torch 2.13.0", "flash_attention_2", "cuda", "float16", (64, 64), "flash_attention_2 (torch 2.13.0, pages"),
        ("torch 2.13.0", "triton-invariant", "cpu", "bfloat16", (64, 64), "triton-invariant (FlashAttention runs on"),
        ("torch 2.13.0", "triton-invariant", "cuda", "float32", (64, 64), "triton-invariant (FlashAttention takes no"),
        ("torch 2.13.0", "triton-invariant", "cuda", "bfloat16", (192, 128), "triton-invariant (FlashAttention takes"),
        ("torch 2.13.0", "sdpa", "cuda", "bfloat16", (64, 64), "sdpa (padded and gathered, no CUDA graphs)"),
        ("", "flash_attention_2", "cuda", "bfloat16", (64, 64), "flash_attention_2 (gathered, no CUDA graphs: torch"),
        ("", "flash_attention_3", "cuda", "bfloat16", (64, 64), "flash_attention_3 (gathered, no CUDA graphs)"),
    ],
)  # fmt: skip
def test_what_runs_and_why(
    installed: str,
    asked: str,
    device: str,
    dtype: str,
    widths: tuple[int, int],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(baseline, "paged_flash_attention", lambda: (installed, "" if installed else TORCH))
    found = baseline_attention(asked, device, dtype, key_dim=widths[0], value_dim=widths[1])
    assert str(found).startswith(expected)
    assert found.is_own == (found.name == "triton-invariant")
    assert found.paged == ("pages of a multiple" in found.why)
    fault = "paged FlashAttention gives wrong numbers here, off by nan"
    again = baseline_attention(asked, device, dtype, key_dim=widths[0], value_dim=widths[1], fault=fault)
    assert not again.paged
    if found.paged:
        assert again.name == asked
        assert fault in again.why
