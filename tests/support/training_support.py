"""A tiny model and sequences for it."""

import numpy as np
import torch

from vexact.algorithms import CorrectionConfig, Rejection
from vexact.models import ModelConfig, random_model
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.passes.forward import token_scores
from vexact.types import Sample, TrainSequence

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}
REJECT = (Rejection("token_k2", 0.02), Rejection("seq_mean_k1", 1.5, 0.66))
CORRECTIONS = {
    "token": CorrectionConfig("token", 2.0),
    "icepop": CorrectionConfig("token", 1.2, 0.8),
    "sequence": CorrectionConfig("sequence", 2.0),
    "normalised": CorrectionConfig("sequence", 2.0, batch_normalize=True),
    "rejected": CorrectionConfig(rejections=REJECT),
    "veto": CorrectionConfig(veto=0.9),
    "all": CorrectionConfig("token", 2.0, batch_normalize=True, rejections=REJECT, veto=0.5),
}


def tiny_model(seed=0, dtype=torch.float32, **overrides):
    return random_model(ModelConfig.from_hf_dict(TINY | overrides), seed, dtype)


def tiny_actor(seed=0, lr=1e-2, **config):
    """A fresh actor; equal arguments give equal weights."""
    optim = config.pop("optim", OptimConfig(lr=lr))
    return Actor(tiny_model(seed), ActorConfig(optim=optim, **config))


def random_sequences(count, seed=0, temperature=0.8, ref_logprobs=False):
    """Random tokens with made-up old log-probabilities around log(1/V), some of them far enough off to be clipped."""
    rng = np.random.default_rng(seed)
    sequences = []
    for i in range(count):
        prompt, response = (tuple(rng.integers(0, 53, rng.integers(2, 9)).tolist()) for _ in range(2))
        old = rng.normal(-4.0, 0.3, len(response)).astype(np.float32)
        floor = np.full(len(response), -np.inf, np.float32)
        sample = Sample(f"request-{i}", prompt, response, old, floor, temperature, "stop", 0)
        reference = rng.normal(-4.0, 0.3, len(response)).astype(np.float32) if ref_logprobs else None
        sequences.append(TrainSequence(sample, rng.normal(size=len(response)).astype(np.float32), reference))
    return sequences


def weights_of(actor):
    return {name: tensor.clone() for name, tensor in actor.named_weights()}


def gradients_of_update(actor, sequences, **arguments):
    """The metrics of one update and the gradients of its last optimizer step; they are gone after it."""
    gradients, step = {}, actor.optimizer.step

    def watched(max_norm):
        norm = step(max_norm)
        trained = ((name, p) for name, p in actor.model.named_parameters() if p.requires_grad)
        gradients.update({name: parameter.grad.clone() for name, parameter in trained})
        return norm

    actor.optimizer.step = watched
    return actor.update(sequences, **arguments), gradients


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def kept_bytes(model, batch, recomputed=0):
    """What autograd keeps of one training forward, beside weights and the batch itself."""
    storages = {}
    given = [*model.parameters(), *model.buffers(), batch.input_ids, batch.positions]
    own = {tensor.untyped_storage().data_ptr() for tensor in given}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor  # held, so that no address is used twice

    model.recomputed_layers = recomputed
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = token_scores(model, batch)
    return sum(storages.values()) if scores.logprobs.requires_grad else 0
