"""A tiny random model and a fake tokenizer for the engine's tests."""

from __future__ import annotations

import numpy as np
import torch

from vexact.models import ModelConfig, random_model
from vexact.ops import PackedMetadata, linear_cross_entropy
from vexact.rollout import SamplingParams

GPU_SIZES = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
VOCAB = 97


def tiny_config(**changes):
    """Qwen3 with 2 layers, hidden 32, 4 query and 2 key heads; wide initial weights so that logits differ."""
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "eos_token_id": VOCAB - 1,
    }
    return ModelConfig.from_hf_dict(raw | changes)


def tiny_model(seed=0, dtype=torch.float32, ops="invariant", **changes):
    return random_model(tiny_config(**changes), seed=seed, dtype=dtype, ops=ops)


def packed_hidden(model, samples):
    """Hidden states (T, H) of all samples in one packed forward, and the rows that predict a sampled token."""
    lengths = [sample.num_tokens for sample in samples]
    tokens = torch.tensor([t for s in samples for t in (*s.prompt_token_ids, *s.token_ids)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    rows, start = [], 0
    for sample in samples:
        first = start + len(sample.prompt_token_ids) - 1
        rows += range(first, first + len(sample.token_ids))
        start += sample.num_tokens
    with torch.no_grad():
        return model(tokens, positions, PackedMetadata.from_lengths(lengths)), torch.tensor(rows), tokens


def training_logits(model, samples):
    """fp32 logits of every packed token, and the rows that predict a sampled token."""
    hidden, rows, _ = packed_hidden(model, samples)
    with torch.no_grad():
        return model.logits(hidden), rows


def training_logprobs(model, samples):
    """fp32 log-probabilities of every sampled token by one packed forward over all samples."""
    hidden, rows, tokens = packed_hidden(model, samples)
    counts = [len(sample.token_ids) for sample in samples]
    inv_temperature = np.repeat(np.float32([sample.inv_temperature for sample in samples]), counts)
    min_logit = np.concatenate([sample.min_logits for sample in samples])
    with torch.no_grad():
        logprobs = linear_cross_entropy(
            hidden[rows],
            model.lm_head_weight,
            tokens[rows + 1],
            torch.from_numpy(inv_temperature),
            torch.from_numpy(min_logit),
        ).logprobs
    return np.split(logprobs.numpy(), np.cumsum(counts)[:-1])


def bits(array):
    """fp32 as int32: NaN-proof, sign-of-zero-proof equality."""
    return np.ascontiguousarray(array, dtype=np.float32).view(np.int32).tolist()


def sampled_by_graphs(engine, prompts):
    """Token ids and the bits of their log-probabilities, of two samples of each prompt that captured graphs decode."""
    params = SamplingParams(n=2, max_tokens=24, temperature=0.8, top_p=0.9, ignore_eos=True)
    engine.stats()
    found = engine.generate(prompts, params, [f"r{number}" for number in range(len(prompts))])
    assert engine.stats()["rollout/graph_ratio"] > 0.8
    return [(s.token_ids, bits(s.logprobs)) for s in found]


class LetterTokenizer:
    """Token i is the letter i % 26, except that tokens >= 90 are special and print nothing."""

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join("" if token >= 90 else chr(97 + token % 26) for token in token_ids)


class Utf8Tokenizer:
    """Token i is byte i, so characters span tokens."""

    def decode(self, token_ids, skip_special_tokens=False):
        return bytes(token_ids).decode("utf-8", errors="replace")
