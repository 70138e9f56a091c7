"""verl's TrainingWorker, loss and mismatch metric with vexact's engines: what is sampled is what is trained."""

from types import SimpleNamespace

import pytest
import torch
from worker_support import Rollout, Step, make_prompts, make_worker

STEPS = 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_token_differs_over_updates(model_path, precision):
    worker, rollout, prompts = make_worker(model_path, precision), Rollout(model_path, precision), make_prompts()
    first = None
    for step in range(STEPS):
        outputs = rollout.generate(prompts, step)
        batch = Step(prompts, outputs)
        old = batch.logprobs(worker)
        assert old.values().numel() > 150
        assert (batch.num_different(old), batch.diff_max(old)) == (0, 0.0)
        metrics = batch.train(worker, old, seed=step)
        # the first forward of the update gives the bits of the rollout again: no pass for old ones was needed
        assert {value for metric in metrics["actor/ppo_kl"] for value in metric.values} == {0.0}
        assert metrics["grad_norm"] > 0
        assert {output.extra_fields["global_steps"] for output in outputs} == {step}
        rollout.sync(worker, step + 1)
        first = first or [output.token_ids for output in outputs]
    assert first != [output.token_ids for output in rollout.generate(prompts, 0)], "three updates changed nothing"


def test_verls_own_engine_with_our_attention_alone_is_not_exact(model_path):
    """The control: the same comparison finds differences where there are some."""
    worker, rollout, prompts = make_worker(model_path, "fp32", "fsdp2"), Rollout(model_path, "fp32"), make_prompts()
    rollout.sync(worker, 1)
    batch = Step(prompts, rollout.generate(prompts, 0))
    old = batch.logprobs(worker)
    assert batch.num_different(old) > 0
    assert 0 < batch.diff_max(old) < 1e-4


@pytest.mark.parametrize(("top_p", "top_k"), [(0.7, -1), (1.0, 4), (0.9, 6)])
def test_truncated_samples_carry_their_thresholds(model_path, top_p, top_k):
    worker, prompts = make_worker(model_path, "bf16"), make_prompts()
    rollout = Rollout(model_path, "bf16", top_p=top_p, top_k=top_k)
    outputs = rollout.generate(prompts, 0)
    batch = Step(prompts, outputs)
    assert batch.num_different(batch.logprobs(worker)) == 0
    filler = SimpleNamespace(token_ids=[1], log_probs=[0.0], extra_fields=outputs[0].extra_fields)
    filled = Step([*prompts, [1] * 127], [*outputs, filler], num_fillers=1)
    assert filled.num_different(filled.logprobs(worker), rows=len(prompts)) == 0
    for output in outputs:
        output.extra_fields.pop("vexact")  # as clients for partial rollouts do
    lost = Step(prompts, outputs)
    with pytest.raises(ValueError, match="came without its thresholds"):
        lost.logprobs(worker)


def test_bypass_mode_trains_on_the_rollouts_log_probabilities(model_path):
    """``algorithm.rollout_correction.bypass_mode``: the same update without the pass for old log-probabilities."""
    prompts, states = make_prompts(), []
    for recompute in (True, False):
        worker, rollout = make_worker(model_path, "bf16"), Rollout(model_path, "bf16")
        batch = Step(prompts, rollout.generate(prompts, 0))
        batch.train(worker, batch.logprobs(worker) if recompute else batch.rollout_logprobs)
        states.append([weight.clone() for _, weight in worker.engine.actor.named_weights()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_greedy_samples_are_scored_as_they_were_drawn(model_path):
    worker, rollout, prompts = make_worker(model_path, "fp32"), Rollout(model_path, "fp32"), make_prompts()
    batch = Step(prompts, rollout.generate(prompts, 0, temperature=0, top_p=1.0, top_k=-1))
    assert batch.num_different(batch.logprobs(worker)) == 0
