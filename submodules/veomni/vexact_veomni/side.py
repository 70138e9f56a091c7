"""``vexact verify --model_backend veomni``: VeOmni's model as the training side."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from veomni.models import build_foundation_model
from veomni.models.module_utils import load_model_weights

from vexact.audit.verify.routes import RouteTap
from vexact.models.checkpoint.index import check_one_reading
from vexact.ops import hf
from vexact.training.batches.batch import PackedBatch
from vexact_veomni.convert import convert
from vexact_veomni.experts import keep_biases, without_balance_loss
from vexact_veomni.slots import model_type_of, ops_implementation


class VeomniSide:
    """A ``vexact.audit.verify.sides.TrainingSide``; the fused head is the model's own forward with labels."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.routes = RouteTap(model)

    def _inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """One row of packed sequences, as VeOmni's collator describes it."""
        cu_seqlens, longest = batch.attention.cu_seqlens, batch.attention.max_seqlen
        return {
            "input_ids": batch.input_ids[None],
            "position_ids": batch.positions[None],
            "use_cache": False,
            **without_balance_loss(self.model),
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }

    def logits(self, batch: PackedBatch) -> Tensor:
        return self.model(**self._inputs(batch), logits_to_keep=batch.targets.rows).logits[0].float()

    def logprobs(self, batch: PackedBatch) -> Tensor:
        targets = batch.targets
        labels = torch.full_like(batch.input_ids, -100).index_copy(0, targets.rows, targets.token_ids)[None]
        out = self.model(
            **self._inputs(batch),
            labels=labels,
            shift_labels=labels,
            return_log_probs=True,
            inv_temperature=targets.inv_temperature.view(torch.int32),  # bits: FSDP2 may cast what is a float
            min_logit=targets.min_logit.view(torch.int32),
        )
        return out.fused_linear_aux.log_probs[0].index_select(0, targets.rows)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((n, torch.zeros_like(p) if p.grad is None else p.grad) for n, p in self.model.named_parameters())

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)


def load_side(path: Path, dtype: torch.dtype, device: torch.device, attn_impl: str) -> VeomniSide:
    """
    Raises:
        ValueError: VeOmni has no such model, or it cannot be made exact. With stock attention the rest is exchanged all
            the same, for a comparison that must differ.
    """
    check_one_reading(path)
    model = build(path, dtype, device, ops_implementation(attn_impl, model_type=model_type_of(path)))
    return VeomniSide(convert(model, check=attn_impl == hf.NAME).eval())


def build(path: Path, dtype: torch.dtype, device: torch.device, kernels: Any) -> Any:
    """VeOmni's model with the checkpoint's weights, outside of any process group."""
    name = str(dtype).removeprefix("torch.")
    try:
        # Without a process group VeOmni leaves weights of its own loading on the meta device
        model: Any = build_foundation_model(
            str(path), torch_dtype=name, init_device=device.type, ops_implementation=kernels
        )
        keep_biases(model)
        load_model_weights(model, str(path), device.type)
    except Exception as error:  # of any class: what our loader takes, VeOmni may still refuse
        raise ValueError(f"VeOmni cannot load {path}: {error}") from error
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.to(device)
