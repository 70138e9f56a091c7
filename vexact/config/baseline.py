"""What attention the stock rollout (``batch_invariant=false``) runs, known from what is installed."""

from __future__ import annotations

from typing import NamedTuple

from vexact.attention import TRITON_INVARIANT, paged_flash_attention

FLASH = "flash_attention_2"
PAGE_MULTIPLE = 256  # FlashAttention-2 reads no other pages
_HALF = ("bfloat16", "float16")
_UNCAPTURED = {"sdpa": "padded and gathered", "flash_attention_3": "gathered"}


class BaselineAttention(NamedTuple):
    """``name`` is what runs; ``why`` is a phrase in brackets after it, or empty."""

    name: str
    why: str
    paged: bool = False  # FlashAttention reads the cache's pages in place

    @property
    def is_own(self) -> bool:
        """Whether it is this project's kernel, and no stock operator."""
        return self.name == TRITON_INVARIANT

    def __str__(self) -> str:
        return f"{self.name} ({self.why})" if self.why else self.name


def baseline_attention(
    attn_impl: str, device: str, dtype: str, *, key_dim: int, value_dim: int, fault: str = ""
) -> BaselineAttention:
    """The attention of a rollout with stock operators. A name that was asked for is the one that runs.

    Args:
        attn_impl: as configured. ``triton-invariant``, the default, asks for the best there is: FlashAttention where
            it can read pages, else this project's own paged kernel, which is then no stock operator and says so.
        device: "cpu" or "cuda".
        dtype: compute type, e.g. "bfloat16".
        key_dim, value_dim: width of a head's keys and values.
        fault: what the installed FlashAttention did wrong when it was tried on the device.
    """
    source, reason = paged_flash_attention()
    reason = reason or fault
    if device != "cuda":
        reason = "FlashAttention runs on CUDA only"
    elif dtype not in _HALF:
        reason = f"FlashAttention takes no {dtype}"
    elif key_dim != value_dim or key_dim % 8:
        reason = f"FlashAttention takes one head dim, a multiple of 8, not {key_dim} and {value_dim}"
    if attn_impl in _UNCAPTURED:
        return BaselineAttention(attn_impl, f"{_UNCAPTURED[attn_impl]}, no CUDA graphs")
    if not reason:
        return BaselineAttention(FLASH, f"{source}, pages of a multiple of {PAGE_MULTIPLE}", paged=True)
    if attn_impl == FLASH:
        return BaselineAttention(FLASH, f"gathered, no CUDA graphs: {reason}")
    return BaselineAttention(attn_impl, reason)
