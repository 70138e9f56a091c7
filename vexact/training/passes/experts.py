"""The experts of one mini-batch: how many tokens each one got, the loss that balances them, and the bias that does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vexact.models import CausalLM, ModelConfig
from vexact.models.layers import Balance, MoE, Routing
from vexact.training.batches.batch import PackedBatch
from vexact.training.config import ActorConfig
from vexact.training.parallel.ranks import Ranks, first_row, local

AUX_KEY = "actor_rollout_ref.actor.router_aux_loss_coef"
RATE_KEY = "actor_rollout_ref.actor.router_bias_update_rate"


def check_experts(config: ActorConfig, model: ModelConfig) -> float:
    """The coefficient of the balance loss that is in force.

    Raises:
        ValueError: a setting asks for what the model does not have; or config.json's coefficient is none.
    """
    coefficient, rate = config.router_aux_loss_coef, config.router_bias_update_rate
    moe = model.moe if model.chooses_experts else None
    if moe is None:
        for key, value in ((AUX_KEY, coefficient), (RATE_KEY, rate)):
            if value:
                raise ValueError(f"{key}={value:g}: {model.described} has no experts to balance; set it to 0")
    elif rate and not moe.correction_bias:
        raise ValueError(
            f"{RATE_KEY}={rate:g}: {model.architecture} has no bias that is added to the scores of experts, as "
            f"DeepseekV3ForCausalLM has; set it to 0 and use {AUX_KEY}"
        )
    if coefficient is not None:
        return coefficient
    return 0.0 if moe is None else _own_coefficient(model.raw)


def _own_coefficient(raw: Mapping[str, Any]) -> float:
    """What config.json asks for: DeepSeek's aux_loss_alpha, or router_aux_loss_coef beside output_router_logits."""
    key = "aux_loss_alpha" if "aux_loss_alpha" in raw else "router_aux_loss_coef"
    if key == "router_aux_loss_coef" and not raw.get("output_router_logits"):
        return 0.0
    value = raw.get(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"config.json: {key}={value!r} is no coefficient of a loss; set {AUX_KEY} to a number")
    return float(value)


def padding_of(batch: PackedBatch) -> Tensor | None:
    """(T,) bool, this rank's tokens that only fill its slice up; None where there are none."""
    num_sequences = len(batch.response_lengths)
    if batch.part is None or len(batch.packed.cu_seqlens) - 1 == num_sequences:
        return None
    return sequence_of(batch) == num_sequences


def sequence_of(batch: PackedBatch) -> Tensor:
    """(T,) int64, the sequence of each of this rank's tokens."""
    first = 0 if batch.part is None else batch.part.tokens.start
    ends = batch.packed.cu_seqlens[1:]
    tokens = torch.arange(first, first + len(batch.input_ids), device=ends.device, dtype=ends.dtype)
    return torch.searchsorted(ends, tokens, right=True)


class ExpertWatch:
    """What the routers of a model do in the micro-batches of one mini-batch that this rank computes."""

    def __init__(self, model: ModelConfig, coefficient: float, num_sequences: int, ranks: Ranks) -> None:
        """``num_sequences``: of the whole mini-batch, over all ranks."""
        assert model.moe is not None
        self._moe, self._coefficient, self._num_sequences, self._ranks = model.moe, coefficient, num_sequences, ranks
        size = (model.num_layers, model.moe.num_experts)
        self._loads = torch.zeros(size, dtype=torch.int64, device=ranks.device)
        self._own: Routing | None = None  # of the micro-batch under way

    def begin(self, batch: PackedBatch) -> Routing:
        """What the forward of a micro-batch, no filler, is to note and to add."""
        self._own = Routing(padding=padding_of(batch), loads=torch.zeros_like(self._loads))
        if self._coefficient:
            self._own = replace(self._own, balance=self._balance(batch))
        return self._own

    def _balance(self, batch: PackedBatch) -> Balance:
        num_sequences = len(batch.response_lengths)
        part = batch.part
        return Balance(
            sequence=sequence_of(batch),
            lengths=batch.packed.cu_seqlens.diff()[:num_sequences].float(),
            share=1.0 / self._num_sequences,
            coefficient=self._coefficient,
            losses=torch.zeros(len(self._loads), dtype=torch.float64, device=self._ranks.device),
            total=(lambda counts: counts) if part is None else part.ranks.add_whole,
        )

    def end(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Adds the micro-batch up, after its backward; returns its metrics, whether it was begun or is a filler."""
        own, self._own = self._own, None
        if own is not None and own.loads is not None:
            self._loads += own.loads
        if not self._coefficient:
            return {}
        loss = self._loads.new_zeros((), dtype=torch.float64)
        if own is not None and own.balance is not None:
            loss = own.balance.losses.sum()
            loss = loss if batch.part is None else batch.part.ranks.add_in_order(loss)
        return {"router_aux_loss": loss / len(self._moe.layers)}

    def loss_of(self, metrics: Mapping[str, Tensor]) -> Tensor | float:
        """The part of what is differentiated that ``end`` has given the metrics of."""
        return self._coefficient * len(self._moe.layers) * metrics["router_aux_loss"] if metrics else 0.0

    def total(self) -> Tensor:
        """(layers with experts, E) int64: tokens of every expert over the mini-batch. All ranks call it together."""
        return self._ranks.add_bits(self._loads)[sorted(self._moe.layers)]


def load_metrics(loads: Tensor) -> dict[str, float]:
    """Of (layers, E) counts, by name without "actor/"."""
    on_host = loads.cpu().double()
    worst = on_host.amax(1) / on_host.mean(1)
    return {
        "moe_load_max_over_mean": worst.mean().item(),
        "moe_idle_experts": (on_host == 0).double().mean().item(),
    }


@torch.no_grad()
def update_router_bias(model: CausalLM, loads: Tensor, rate: float, ranks: Ranks) -> None:
    """bias += rate * sign(mean load - load), of every expert: the loss-free balancing of DeepSeek-V3 (arXiv 2412.19437,
    section 2.1.2).

    Loads are whole numbers and so is what decides the sign, so no bit depends on the ranks.

    Args:
        loads: (layers with experts, E) int64, of the mini-batch over all ranks.
    """
    routers = [module.router for module in model.modules() if isinstance(module, MoE)]
    signs = torch.sign(loads.sum(1, keepdim=True) - loads * loads.shape[1])
    for router, sign in zip(routers, signs, strict=True):
        assert router.bias is not None, "the actor checks the model"
        rows = local(router.bias)
        first = first_row(len(sign), ranks)
        rows += rate * sign[first : first + len(rows)].to(rows.dtype)
