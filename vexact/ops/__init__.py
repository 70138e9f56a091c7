"""Batch-invariant operators: a row's bits depend on that row alone.

CUDA tensors run Triton kernels, CPU tensors run their plain-torch twins; each is imported on first use.
"""

from vexact.ops.attention import (
    PackedMetadata,
    PagedMetadata,
    attention,
    cached_attention,
    flash_attn_varlen_func,
    write_kv,
)
from vexact.ops.embedding import embedding
from vexact.ops.linear import linear
from vexact.ops.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_one_pass,
    linear_cross_entropy_trained,
)
from vexact.ops.linear_swiglu import linear_swiglu
from vexact.ops.logprob import token_logprobs
from vexact.ops.moe import (
    ExpertGroups,
    Routes,
    combine,
    group_tokens,
    grouped_linear,
    grouped_swiglu,
    route,
    route_and_group,
)
from vexact.ops.rms_norm import add_rms_norm, rms_norm
from vexact.ops.rotary.latent_rope import latent_rope
from vexact.ops.rotary.qk_norm_rope import qk_norm_rope
from vexact.ops.rotary.rope import rope
from vexact.ops.rotary.rope_to_cache import HeadNorms, rope_to_cache
from vexact.ops.sampling import SamplingTensors, sample
from vexact.ops.swiglu import swiglu

__all__ = [
    "ExpertGroups",
    "HeadNorms",
    "PackedMetadata",
    "PagedMetadata",
    "Routes",
    "SamplingTensors",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "combine",
    "embedding",
    "flash_attn_varlen_func",
    "group_tokens",
    "grouped_linear",
    "grouped_swiglu",
    "latent_rope",
    "linear",
    "linear_cross_entropy",
    "linear_cross_entropy_one_pass",
    "linear_cross_entropy_trained",
    "linear_swiglu",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "rope_to_cache",
    "route",
    "route_and_group",
    "sample",
    "swiglu",
    "token_logprobs",
    "write_kv",
]
