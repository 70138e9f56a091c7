"""The micro-batch of `forward_backward.py`, and the trainer's own forward and backward of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vexact.algorithms import Denominators
from vexact.models import CausalLM, ModelConfig
from vexact.models.hf_names import to_hf
from vexact.models.load import model_of
from vexact.ops.kernels.attention import launch
from vexact.ops.kernels.attention.batch import Batch
from vexact.ops.kernels.attention.launch import HeadShape, warp_specialised
from vexact.ops.linear_cross_entropy import LinearCrossEntropy, TrainedCrossEntropy
from vexact.training import ActorConfig
from vexact.training.batches.batch import PackedBatch, PolicyTargets, TokenSequence, pack_tokens
from vexact.training.passes import one_pass
from vexact.training.passes.forward import token_scores
from vexact.training.passes.loss import micro_batch_loss

PASSES = ("forward", "backward")
SPECIALISED = frozenset({*PASSES, "paged"})


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Equally long sequences of random tokens, packed, with a policy loss on all of their log-probabilities."""

    tokens: Tensor  # (B, L + 1) int64: a prompt of one token, a response of L
    batch: PackedBatch
    targets: PolicyTargets
    config: ActorConfig

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """(prompt, response) tokens of each sequence."""
        count, length = self.tokens.shape
        return [(1, length - 1)] * count

    def loss(self, scores: LinearCrossEntropy | TrainedCrossEntropy) -> Tensor:
        return micro_batch_loss(scores, self.batch, self.targets, self.config, self.denominators)[0]

    @property
    def denominators(self) -> Denominators:
        return Denominators(len(self.targets.advantages), len(self.tokens))


def micro_batch(model: CausalLM, lengths: Sequence[int], seed: int = 0) -> MicroBatch:
    """Random tokens and advantages; the old log-probabilities are those of ``model``, as after a rollout."""
    device, generator = model.lm_head_weight.device, torch.Generator().manual_seed(seed)
    tokens = torch.randint(model.config.vocab_size, (len(lengths), lengths[0] + 1), generator=generator)
    assert set(lengths) == {lengths[0]}, "a plain batch of stock operators has no padding"
    batch = pack_tokens([TokenSequence(row[:1], row[1:]) for row in tokens.tolist()], device)
    with torch.no_grad():
        old = token_scores(model, batch).logprobs
    advantages = torch.randn(len(old), generator=generator).to(device)
    dtype = str(model.lm_head_weight.dtype).removeprefix("torch.")
    return MicroBatch(tokens.to(device), batch, PolicyTargets(old, advantages, None), ActorConfig(dtype=dtype))


def random_weights(raw: dict, device: torch.device, dtype: torch.dtype) -> CausalLM:
    """Drawn on the device, where so many take no time."""
    config = ModelConfig.from_hf_dict(raw)
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in CausalLM(config).named_parameters()}
    generator = torch.Generator(device).manual_seed(0)
    named = {
        name: torch.ones(shape, dtype=dtype, device=device)
        if name.endswith("norm.weight")
        else torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)
        for name, shape in shapes.items()
    }
    return model_of(config, named, device)


class Ours:
    """Forward, policy loss and backward, as the actor calls them for a micro-batch of a model in its own dtype."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model

    def forward_backward(self, work: MicroBatch, recompute: bool) -> Tensor:
        """Log-probabilities (R,); the gradients are in the model."""
        self.model.recomputed_layers = len(self.model.layers) if recompute else 0
        batch = work.batch
        if one_pass.applies(work.config, self.model.config):
            batch = one_pass.with_derivative(batch, work.targets, work.config, work.denominators)
        scores = token_scores(self.model, batch)
        loss = work.loss(scores)
        (scores.surrogate if isinstance(scores, TrainedCrossEntropy) else loss).backward()
        return scores.logprobs.detach()

    def gradients(self) -> dict[str, Tensor]:
        """By Hugging Face names."""
        grads = ((name, gradient(parameter)) for name, parameter in self.model.named_parameters())
        return dict(to_hf(self.model.config, grads))

    def release(self) -> None:
        self.model.zero_grad(set_to_none=True)


@contextmanager
def attention_form(passes: frozenset[str]) -> Iterator[None]:
    """The passes of attention that take the warp-specialised kernels where there are some."""
    before, launch.PROVEN = launch.PROVEN, passes
    try:
        yield
    finally:
        launch.PROVEN = before


def attention_forms() -> tuple[dict[str, frozenset[str]], str]:
    """The forms of our attention by name, and the name of what is chosen unasked."""
    forms = {"specialised": SPECIALISED, "triton": frozenset[str]()}
    for name, passes in forms.items():
        if launch.PROVEN & set(PASSES) == passes & set(PASSES):
            return forms, name
    return forms | {"as it is": launch.PROVEN}, "as it is"


def specialised_passes(model: CausalLM, work: MicroBatch) -> list[str]:
    """Which passes of training have warp-specialised kernels, as things are."""
    config, packed = model.config, work.batch.packed
    rows, count, longest = len(work.batch.input_ids), len(work.tokens), packed.max_seqlen
    size = model.lm_head_weight.element_size()
    shape = HeadShape(config.num_heads, config.num_kv_heads, config.key_dim, config.value_dim, size)
    batch, device = Batch(rows, count, longest, longest, True), model.lm_head_weight.device
    return [name for name in PASSES if warp_specialised(name, shape, device, None, batch)]


def gradient(parameter: Tensor) -> Tensor:
    """That of a parameter which must have one."""
    if parameter.grad is None:
        raise ValueError("a parameter has no gradient")
    return parameter.grad
