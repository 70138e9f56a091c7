"""The rollout on stock operators (``batch_invariant=false``): as fast as others decode, so that it is a peer.

cuBLAS products, pointwise operators fused by torch's compiler, and FlashAttention on the pages of the cache where one
is installed that can read them; all of it under CUDA graphs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from vexact.config.baseline import PAGE_MULTIPLE, BaselineAttention, baseline_attention
from vexact.models.decoder import CausalLM
from vexact.models.layers.moe import Experts
from vexact.models.opset import OpSet, mark_replayable, set_ops
from vexact.ops import stock
from vexact.ops.stock import fused, moe, paged
from vexact.rollout.engine_config import EngineConfig

log = logging.getLogger(__name__)


def apply_baseline(model: CausalLM, config: EngineConfig) -> tuple[EngineConfig, BaselineAttention]:
    """Gives a model on stock operators the fastest ones that its device has.

    Returns:
        The configuration, with larger pages if FlashAttention needs them (never fewer tokens in all); and what
        attention runs, which is also logged.
    """
    shape, weight = model.config, model.lm_head_weight
    device = weight.device
    dtype = str(weight.dtype).removeprefix("torch.")
    attention_for = partial(
        baseline_attention, config.attn_impl, device.type, dtype, key_dim=shape.key_dim, value_dim=shape.value_dim
    )
    found = attention_for()
    if found.paged:
        fault = paged.fault(shape.num_heads, shape.num_kv_heads, shape.key_dim, weight.dtype, device)
        found = attention_for(fault=fault)
    ops = model.ops
    if found.paged:
        ops = replace(ops, attention=paged.paged_flash_attention_2)
        config = _with_larger_pages(config)
    if device.type == "cuda":
        ops = _fused(ops)
    set_ops(model, _with_grouped_products(model, ops))
    log.info("rollout on stock operators (batch_invariant=false), attention: %s", found)
    return config, found


def _fused(ops: OpSet) -> OpSet:
    compiled = fused.fused()
    return replace(ops, **{name: mark_replayable(op, if_is=getattr(stock, name)) for name, op in compiled.items()})


def _with_grouped_products(model: CausalLM, ops: OpSet) -> OpSet:
    """Operators of experts that a graph can hold, where the device has them; and where there are no experts, since what
    never runs must not keep steps from being captured."""
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    weights = [weight for one in experts for weight in (one.gate_up_proj, one.down_proj)]
    if not all(map(moe.has_grouped_product, weights)):
        return ops
    return replace(ops, grouped_linear=moe.grouped_product, grouped_swiglu=moe.grouped_product_swiglu)


def _with_larger_pages(config: EngineConfig) -> EngineConfig:
    page_size = -(-config.page_size // PAGE_MULTIPLE) * PAGE_MULTIPLE
    if page_size == config.page_size:
        return config
    num_pages = config.num_pages and -(-config.num_pages * config.page_size // page_size)
    return replace(config, page_size=page_size, num_pages=num_pages)
