"""Attention implementations under the names that users know, and which of them can be had on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

TRITON_INVARIANT = "triton-invariant"
_PAGED_TORCH = (2, 13)


@dataclass(frozen=True, slots=True)
class AttentionImpl:
    """One attention implementation under the name users know it by."""

    invariant: bool  # its result for a row never depends on the rest of the batch
    packages: tuple[str, ...] = ()  # the imports of which it needs one; none if it is built in
    adapter: bool = True  # whether this version can call it
    cuda: bool = False  # runs on CUDA GPUs only


ATTENTION: Mapping[str, AttentionImpl] = MappingProxyType(
    {
        TRITON_INVARIANT: AttentionImpl(invariant=True),
        "sdpa": AttentionImpl(invariant=False),
        "flash_attention_2": AttentionImpl(
            invariant=False, packages=("flash_attn.flash_attn_interface", "torch.nn.attention.varlen"), cuda=True
        ),
        "flash_attention_3": AttentionImpl(invariant=False, packages=("flash_attn_interface",), cuda=True),
        "fa-invariant": AttentionImpl(invariant=True, packages=("flash_attn_interface",), adapter=False),
        "fa-invariant-cute": AttentionImpl(invariant=True, packages=("flash_attn.cute",), adapter=False),
    }
)


def check_attention(name: str, key: str) -> None:
    """
    Args:
        name: the implementation asked for.
        key: the setting that asked for it, for the message.

    Raises:
        ValueError: no such name, it needs a package or a GPU that is not there, or this version cannot use it.
    """
    if name not in ATTENTION:
        raise ValueError(f"{key}={name}: unknown attention implementation; known: {', '.join(ATTENTION)}")
    impl = ATTENTION[name]
    if impl.packages and not any(map(_installed, impl.packages)):
        raise ValueError(
            f"{key}={name} needs the package {' or '.join(impl.packages)}, which is not installed; "
            f"use {TRITON_INVARIANT} or sdpa"
        )
    if not impl.adapter:
        raise ValueError(
            f"{key}={name}: {impl.packages[0]} is installed, but this version has no adapter for it; "
            f"use {TRITON_INVARIANT} or sdpa"
        )
    if impl.cuda and not _has_cuda():
        raise ValueError(
            f"{key}={name} runs on CUDA GPUs, and torch finds none on this machine; use {TRITON_INVARIANT} or sdpa"
        )


def paged_flash_attention() -> tuple[str, str]:
    """Which FlashAttention-2 can read a paged cache, and why none can; one of the two is empty.

    ``varlen_attn`` of torch takes block tables from 2.12 on, and from 2.13 on also without FlashAttention-3.
    """
    import torch

    if _installed("flash_attn.flash_attn_interface"):
        return "the package flash_attn", ""
    version = torch.__version__.partition("+")[0]
    if tuple(map(int, version.split(".")[:2])) < _PAGED_TORCH:
        return "", f"torch {version} has no paged attention, and the package flash_attn is not installed"
    return f"torch {version}", ""


def attention_warning(rollout: str, trainer: str) -> str | None:
    """What to tell the user at the start when the two sides' attention cannot agree bit for bit; None when it can."""
    if rollout == trainer and ATTENTION[rollout].invariant:
        return None
    return (
        f"attention of rollout and trainer is not bit-identical: {rollout} (rollout) and {trainer} (trainer); "
        f"use {TRITON_INVARIANT} for both"
    )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # the parent of a dotted name is absent or broken
        return False


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
