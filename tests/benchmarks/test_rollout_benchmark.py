"""The benchmark of a fixed batch: its roofline by hand, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rollout import throughput
from benchmarks.shared.clock import covered
from benchmarks.shared.roofline import HBM_BYTES_PER_S, Traffic
from benchmarks.trainer.grpo_run import SHAPES

DENSE = SHAPES["tiny"].raw | {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 100, "intermediate_size": 16}
DENSE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}
LAYER = 8 * 4 * 6 + 3 * 8 * 16 + 2 * 8 + 2 * 4  # products, and the norms of x and of a head's queries and keys


@pytest.mark.parametrize("tied", [True, False])
def test_a_dense_roofline_by_hand(tied: bool) -> None:
    traffic = Traffic.of(DENSE | {"tie_word_embeddings": tied})
    weights = 2 * (2 * LAYER + 8 + 100 * 8)  # the head, never an embedding beside it
    assert (traffic.weights(1), traffic.weights(64), traffic.per_key) == (weights, weights, 2 * 2 * 2 * 4)
    keys = 3 * (10 + 1) * traffic.per_key  # 3 tokens after 10: 10, 11 and 12 keys
    assert traffic.seconds([(10, 3)], 256) == pytest.approx((3 * weights + keys) / HBM_BYTES_PER_S)
    two = traffic.seconds([(10, 3), (10, 3)], 256)
    assert two == pytest.approx((3 * weights + 2 * keys) / HBM_BYTES_PER_S)
    assert traffic.seconds([(10, 3), (10, 3)], 1) == pytest.approx((6 * weights + 2 * keys) / HBM_BYTES_PER_S)


def test_experts_are_read_as_often_as_they_are_expected_to_be_chosen() -> None:
    traffic = Traffic.of(SHAPES["tiny-moe"].raw)
    expert = 2 * 2 * 3 * 64 * 32  # bf16, two layers
    assert traffic.experts == 8 * expert
    assert traffic.weights(1) - traffic.always == pytest.approx(2 * expert), "the two of one token"
    assert traffic.weights(2) - traffic.always == pytest.approx((2 + 2 * 6 / 8) * expert)
    assert traffic.weights(10_000) - traffic.always == pytest.approx(8 * expert)


def test_time_covered_by_kernels() -> None:
    assert covered([]) == 0
    assert covered([(10, 12), (0, 4), (1, 2), (3, 5)]) == 7


def test_a_batch_beside_the_roofline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "record.json"
    more = ["--prompt_tokens", "9", "--new_tokens", "6", "--repeats", "1", "--out", str(out)]
    assert throughput.main(["--shape", "tiny", "--sides", "exact", "stock", *more]) == 0
    record = json.loads(out.read_text())
    assert record["sides"]["exact"]["against_training"]["log_probs_compared"] == 8 * 6
    assert record["sides"]["exact"]["against_training"]["log_probs_different"] == 0
    assert list(record["exactness_tax"]) == ["1", "8"]
    assert "exactness tax at 8: " in capsys.readouterr().out
