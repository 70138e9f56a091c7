"""One full GRPO step against an independent implementation: plain transformers, padded batch, own formulas."""

import numpy as np
import pytest
import torch
from training_support import gradients_of_update
from transformers import Qwen3Config, Qwen3ForCausalLM

from vexact.algorithms import AdvantageConfig, AdvantageInputs, PolicyLossConfig, advantage_estimator
from vexact.models import load_model
from vexact.models.hf_names import to_hf
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.types import Sample, TrainSequence

TEMPERATURE = 0.7
LR, WEIGHT_DECAY, BETAS, EPS = 1e-2, 0.1, (0.9, 0.99), 1e-6
LOW, HIGH, DUAL, GRAD_CLIP = 0.2, 0.28, 1.5, 0.5
MAX_RESPONSE = 10
REWARDS = np.array([[1.0, 0.0, 0.0], [0.5, 0.5, 2.0], [1.0, 1.0, 1.0], [0.0, 3.0, 1.0]], np.float32)


def hugging_face_model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, initializer_range=0.15,
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    return Qwen3ForCausalLM(config).float()


def rollout(rng):
    """(prompt, response) token ids of 4 prompts with 3 samples each."""
    pairs = []
    for _ in range(4):
        prompt = rng.integers(1, 61, rng.integers(2, 9)).tolist()
        pairs += [(prompt, rng.integers(1, 61, rng.integers(1, MAX_RESPONSE + 1)).tolist()) for _ in range(3)]
    return pairs


def padded_logprobs(model, pairs):
    """Log-probabilities (B, MAX_RESPONSE) at TEMPERATURE and their mask from a right-padded batch."""
    width = max(len(p) + len(r) for p, r in pairs)
    ids, attend = torch.zeros(len(pairs), width, dtype=torch.long), torch.zeros(len(pairs), width, dtype=torch.long)
    for row, (prompt, response) in enumerate(pairs):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        attend[row, : len(prompt) + len(response)] = 1
    distribution = torch.log_softmax(model(input_ids=ids, attention_mask=attend).logits / TEMPERATURE, dim=-1)
    logprobs, mask = torch.zeros(len(pairs), MAX_RESPONSE), torch.zeros(len(pairs), MAX_RESPONSE)
    for row, (prompt, response) in enumerate(pairs):
        for i, token in enumerate(response):
            logprobs[row, i] = distribution[row, len(prompt) + i - 1, token]
            mask[row, i] = 1.0
    return logprobs, mask


def group_advantages():
    """(r - mean) / (std + 1e-6) per prompt, written with numpy's own mean and std."""
    mean, std = REWARDS.mean(1, keepdims=True), REWARDS.std(1, ddof=1, keepdims=True)
    return ((REWARDS - mean) / (std + 1e-6)).reshape(-1)


def expected_loss(model, pairs, old, advantages, agg_mode):
    logprobs, mask = padded_logprobs(model, pairs)
    ratio = torch.exp(logprobs - old)
    a = advantages[:, None]
    surrogate = torch.min(ratio * a, ratio.clamp(1 - LOW, 1 + HIGH) * a)
    surrogate = torch.where(a < 0, torch.max(surrogate, DUAL * a), surrogate)
    losses = -surrogate * mask
    if agg_mode == "token-mean":
        return losses.sum() / mask.sum()
    return (losses.sum(1) / mask.sum(1)).mean()


def expected_step(model, mini_batches, agg_mode):
    """Losses, norms and the clipped gradients of the last of the optimizer steps; ``model`` is updated."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    losses, norms = [], []
    for pairs, old, advantages in mini_batches:
        optimizer.zero_grad()
        loss = expected_loss(model, pairs, old, advantages, agg_mode)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


def our_sequences(pairs, old):
    rewards = torch.from_numpy(REWARDS.reshape(-1))
    lengths = torch.tensor([len(response) for _, response in pairs])
    inputs = AdvantageInputs(rewards, torch.arange(4).repeat_interleave(3), lengths)
    advantages = advantage_estimator("grpo")(inputs, AdvantageConfig()).split(lengths.tolist())
    sequences = []
    for i, (prompt, response) in enumerate(pairs):
        floor = np.full(len(response), -np.inf, np.float32)
        logprobs = old[i, : len(response)].numpy()
        sample = Sample(f"r{i}", tuple(prompt), tuple(response), logprobs, floor, TEMPERATURE, "length", 0)
        sequences.append(TrainSequence(sample, advantages[i].numpy()))
    return sequences


@pytest.mark.parametrize("agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_loss_gradients_and_weights_of_a_grpo_step(tmp_path, agg_mode):
    reference = hugging_face_model()
    reference.save_pretrained(tmp_path)
    pairs = rollout(np.random.default_rng(1))
    with torch.no_grad():
        exact, mask = padded_logprobs(reference, pairs)
    noise = 0.4 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))
    old = (exact + noise) * mask  # ratios on both sides of both clipping bounds

    model = load_model(tmp_path)
    config = ActorConfig(
        ppo_mini_batch_size=6,
        ppo_max_token_len_per_gpu=30,
        clip=PolicyLossConfig(clip_ratio_low=LOW, clip_ratio_high=HIGH, clip_ratio_c=DUAL),
        loss_agg_mode=agg_mode,
        grad_clip=GRAD_CLIP,
        optim=OptimConfig(lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY),
    )
    actor = Actor(model, config)
    calls = []
    metrics, trained = gradients_of_update(
        actor, our_sequences(pairs, old), audit=lambda indices, logprobs, _: calls.append((indices, logprobs))
    )

    advantages = torch.from_numpy(group_advantages())
    halves = [(pairs[part], old[part], advantages[part]) for part in (slice(0, 6), slice(6, 12))]
    losses, norms = expected_step(reference, halves, agg_mode)

    indices, training = calls[0]
    assert indices == [0, 1, 2, 3, 4, 5]
    for i, logprobs in zip(indices, training, strict=True):
        np.testing.assert_allclose(logprobs, exact[i, : len(logprobs)].numpy(), rtol=1e-5, atol=2e-5)
    assert metrics["actor/pg_clipfrac"] > 0.1
    assert metrics["actor/pg_clipfrac_lower"] > 0.01
    assert metrics["actor/pg_loss"] == pytest.approx(np.mean(losses), rel=1e-4, abs=1e-6)
    assert metrics["actor/grad_norm"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert all(sum(len(p + r) - 1 for p, r in half) > 30 for half, _, _ in halves)  # several micro-batches each
    assert min(norms) > GRAD_CLIP  # so that clipping is part of what is compared
    gradients = dict(to_hf(model.config, trained.items()))
    weights = dict(to_hf(model.config, actor.named_weights()))
    expected = dict(reference.named_parameters())
    assert weights.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: n + m)
        torch.testing.assert_close(weights[name], parameter.data, rtol=1e-4, atol=5e-5, msg=lambda m, n=name: n + m)
