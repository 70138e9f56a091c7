"""The loss slot against VeOmni's own, and what it refuses."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from veomni.distributed import parallel_state
from veomni.ops.kernels.cross_entropy import ForCausalLMLoss
from vexact_veomni import convert
from vexact_veomni.loss import causal_lm_loss

from vexact.types import inverse_temperature


@pytest.fixture
def batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 41, (2, 9))
    labels[0, :4] = -100
    return {"hidden_states": torch.randn(2, 9, 16), "weights": torch.randn(41, 16), "labels": labels, "vocab_size": 41}


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_the_loss_is_that_of_veomni(batch, num_items):
    ours = causal_lm_loss(**batch, num_items_in_batch=num_items)
    theirs = ForCausalLMLoss(**batch, num_items_in_batch=num_items)
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1:] == (None, None)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_entropies_are_those_of_veomni(batch, shifted, temperature):
    if shifted:
        batch["shift_labels"] = nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
    loss, logits, ours = causal_lm_loss(**batch, return_log_probs=True, temperature=temperature)
    theirs = ForCausalLMLoss(**batch, return_log_probs=True, temperature=temperature)[2]
    assert loss is logits is None
    assert ours.log_probs.shape == (2, 9)
    torch.testing.assert_close(ours.log_probs[:, :-1], theirs.log_probs[:, :8])
    torch.testing.assert_close(ours.entropy[:, :-1], theirs.entropy[:, :8])
    per_token = causal_lm_loss(**batch, return_log_probs=True, temperature=torch.full((2, 9), temperature))[2]
    assert torch.equal(per_token.log_probs, ours.log_probs)


@pytest.mark.parametrize("temperature", [0.0, 0.26, 0.85, 1.05])
def test_a_temperature_divides_as_the_sampler_does(batch, temperature):
    """Bit for bit: 1 / 0.85 in fp64, then rounded, is another fp32 number."""
    kept = int((nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:] != -100).sum())
    reported = torch.full((kept,), inverse_temperature(temperature))
    expected = causal_lm_loss(**batch, return_log_probs=True, inv_temperature=reported)[2].log_probs
    for given in (temperature, torch.tensor(temperature), torch.full((2, 9), temperature)):
        assert torch.equal(causal_lm_loss(**batch, return_log_probs=True, temperature=given)[2].log_probs, expected)


def test_what_would_change_the_result_is_refused(batch):
    with pytest.raises(ValueError, match="does not support teacher_topk_ids; remove it"):
        causal_lm_loss(**batch, return_log_probs=True, teacher_topk_ids=torch.zeros(1))
    with pytest.raises(
        ValueError, match=r"min_logit arrived as torch\.bfloat16, .*; pass min_logit\.view\(torch\.int32\)"
    ):
        causal_lm_loss(**batch, return_log_probs=True, min_logit=torch.zeros(12, dtype=torch.bfloat16))


def test_sequence_parallelism_is_refused(batch, monkeypatch):
    monkeypatch.setattr(parallel_state, "_PARALLEL_STATE", None)
    dist.init_process_group("fake", rank=0, world_size=2)
    try:
        parallel_state.init_parallel_state(ulysses_size=2, device_type="cpu", name=None)
        for call in (lambda: causal_lm_loss(**batch), lambda: convert(nn.Linear(2, 2))):
            with pytest.raises(
                ValueError, match="ulysses_size=2, cp_size=1: vexact's attention does not gather the slices"
            ):
                call()
    finally:
        dist.destroy_process_group()
