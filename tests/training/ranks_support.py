"""What ranks run in processes of their own, and how their results are compared with one process."""

import hashlib

import torch
from moe_configs import DEEPSEEK_V3, MOONLIGHT, QWEN3_MOE, with_router_biases
from training_support import random_sequences, tiny_model

from vexact.algorithms import CorrectionConfig, Rejection
from vexact.training import Actor, ActorConfig, OptimConfig, Reference
from vexact.training.parallel.ranks import PeerStopped

SMALL = {"vocab_size": 53, "num_hidden_layers": 2, "initializer_range": 0.2}
FIVE = ({"num_experts": 5}, {"n_routed_experts": 5})  # of four ranks the last one has no expert
WEIGHED = CorrectionConfig("sequence", 2.0, batch_normalize=True, rejections=(Rejection("token_k2", 0.5),))
COMMON = {"ppo_mini_batch_size": 7, "ppo_max_token_len_per_gpu": 16, "shuffle": True}
# The mini-batches of 7 and 5 sequences have 4 or 7 micro-batches: 2, 3 and 4 ranks divide them in different ways.
CASES = {
    "plain": ({"tie_word_embeddings": False}, {"loss_agg_mode": "seq-mean-token-mean"}),
    "reference": (
        {},
        {"use_kl_loss": True, "kl_loss_coef": 0.3, "entropy_coeff": 0.01, "loss_mode": "gspo"}
        | {"enable_gradient_checkpointing": True, "recompute_num_layers": 1},
    ),
    "corrected": ({"num_hidden_layers": 1}, {"loss_mode": "reinforce", "correction": WEIGHED}),
    "bfloat16": (
        {"num_hidden_layers": 1},
        {"dtype": "bfloat16", "param_offload": True, "optimizer_offload": True, "enable_gradient_checkpointing": True},
    ),
    "experts": (QWEN3_MOE | SMALL | FIVE[0], {"router_aux_loss_coef": 0.3, "loss_agg_mode": "seq-mean-token-mean"}),
    "latent": (
        MOONLIGHT | SMALL | FIVE[1],
        {"dtype": "bfloat16", "router_bias_update_rate": 0.01, "param_offload": True, "router_aux_loss_coef": 0.1},
    ),
}
# What groups of ranks can share: as many experts for every rank, and for the last ranks fewer.
SHARED_CASES = {
    "eight": (QWEN3_MOE | SMALL, {"router_aux_loss_coef": 0.3, "entropy_coeff": 0.01, "loss_agg_mode": "token-sum"}),
    "eight latent": (DEEPSEEK_V3 | SMALL, {"dtype": "bfloat16", "enable_gradient_checkpointing": True}),
    "six latent": (CASES["latent"][0] | {"n_routed_experts": 6}, CASES["latent"][1]),
}
STEPS = 4


def actor_of(case, group=None, seed=0, **overrides):
    model, config = (CASES | SHARED_CASES)[case]
    config = COMMON | {"optim": OptimConfig(lr=1e-2, betas=(0.9, 0.95))} | config | overrides
    return Actor(with_router_biases(tiny_model(seed, **model)), ActorConfig(**config), group=group)


def batch_of(case, step, group=None):
    """The sequences of an update, with a reference's log-probabilities where the loss wants them."""
    model, config = (CASES | SHARED_CASES)[case]
    sequences = random_sequences(12, seed=step)
    if not config.get("use_kl_loss"):
        return sequences
    reference = Reference(tiny_model(5, **model), ActorConfig(ppo_max_token_len_per_gpu=22), group=group)
    values = reference.logprobs(sequences)
    return [type(s)(s.sample, s.advantages, ref) for s, ref in zip(sequences, values, strict=True)]


def train(actor, case, steps, group=None):
    """The metrics of these updates."""
    return [without_times(actor.update(batch_of(case, step, group))) for step in steps]


def without_times(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("timing", "perf/"))}


def digest(state):
    """SHA-256 of every weight, moment and step count; None on ranks that hold none."""
    sha = hashlib.sha256(str(state["num_updates"]).encode())
    for name, saved in state["parameters"].items():
        for key, value in saved.items():
            sha.update(f"{name} {key} {value if key == 'num_steps' else tuple(value.shape)}".encode())
            if key != "num_steps":
                sha.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest() if state["parameters"] else None


def outcome(call, *args, **kwargs):
    """What a call raises, as text."""
    try:
        call(*args, **kwargs)
    except PeerStopped as error:
        return f"PeerStopped {error.rank}: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
