"""Makes ``triton-invariant`` an attention and an experts implementation of Hugging Face transformers.

    from vexact.ops import hf
    hf.register()
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation=hf.NAME, experts_implementation=hf.NAME, trust_remote_code=False
    )

Batches are packed (sequence boundaries from ``cu_seq_lens_*`` or from ``position_ids`` that restart) or unpadded;
anything else is refused rather than computed differently from what was asked. A router is the model's own; its
exchange, with that of all other operators, is :func:`vexact.swaps.make_invariant`.
"""

from vexact.ops.hf.attention import NAME, Sequences, attention_forward, attention_mask, find_sequences
from vexact.ops.hf.experts import experts_forward

__all__ = [
    "NAME",
    "Sequences",
    "attention_forward",
    "attention_mask",
    "experts_forward",
    "find_sequences",
    "register",
]


def register() -> None:
    """Adds attention, its mask function and experts to transformers under ``NAME``; repeating it is harmless."""
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    ExpertsInterface.register(NAME, experts_forward)
