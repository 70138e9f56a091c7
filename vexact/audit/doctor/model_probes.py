"""The operators' bits at the shapes of one model: rows alone and in company, decoded and packed, sampled and trained.

A library picks its kernels by shape, so what holds for round numbers has to be tried for a model's own. Large sizes are
cut where the rest repeats: a column panel and its remainder, two key heads of a group, a slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vexact.audit.doctor import expert_probes, probes
from vexact.audit.doctor.result import CheckResult, error, ok
from vexact.models import ModelConfig
from vexact.models.config import MlaConfig
from vexact.ops import linear

BATCHES = (1, 2, 3, 7, 24, 25, 33, 49, 100)
COLUMNS = 1024  # widths repeat past this many
_WORK = 1 << 22  # entries of a weight with which every batch size is tried; larger ones get fewer


@dataclass(frozen=True, slots=True)
class Shapes:
    """Sizes of a model that decide which kernels run."""

    products: dict[str, tuple[int, int]]  # by name: columns and inner size
    heads: probes.Heads
    hidden: int
    vocab_size: int

    @classmethod
    def of(cls, config: ModelConfig) -> Shapes:
        """The shapes of a model, cut where they repeat."""
        hidden, inner = config.hidden_size, config.num_heads * config.value_dim
        products = {
            **(_latent(config.mla, config) if config.mla else {"qkv": (_cut(sum(config.qkv_sizes)), hidden)}),
            "attention output": (_cut(hidden), inner),
            "gate and up": (_cut(2 * config.intermediate_size), hidden),
            "down": (_cut(hidden), config.intermediate_size),
            "head": (_cut(config.vocab_size), hidden),
        }
        kv_heads = min(config.num_kv_heads, 2)
        queries = config.num_heads // config.num_kv_heads * kv_heads
        heads = probes.Heads(queries, kv_heads, config.key_dim, config.value_dim)
        return cls(products, heads, hidden, _cut(config.vocab_size))


def model_probe_checks(path: str, device: str) -> Iterator[CheckResult]:
    """One line per operator and type: the type this device computes in, and the checkpoint's own."""
    from vexact.audit.doctor.report import attempt

    config = ModelConfig.from_hf_dir(path)
    shapes = Shapes.of(config)
    for dtype in dict.fromkeys((torch.float32 if device == "cpu" else torch.bfloat16, _own_dtype(config))):
        short = probes.short(dtype)
        heads = shapes.heads
        checks = {
            f"model linear {short}": partial(check_products, shapes.products, device, dtype),
            f"model attention {short}": partial(probes.check_attention_bits, device, dtype, heads, "model attention"),
            f"model logprob {short}": partial(
                probes.check_logprob, device, dtype, shapes.hidden, shapes.vocab_size, "model logprob"
            ),
        }
        if config.moe is not None and config.chooses_experts:
            for title, probe in (
                ("model experts", expert_probes.check_experts),
                ("model grouped products", expert_probes.check_expert_products),
            ):
                checks[f"{title} {short}"] = partial(probe, device, dtype, config.moe, config.hidden_size, title)
        yield from (attempt(name, check) for name, check in checks.items())


def _latent(mla: MlaConfig, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Products of latent attention before its heads attend."""
    queries, heads = config.qkv_sizes[0], config.num_heads
    first = queries if mla.q_rank is None else mla.q_rank
    expanded = {} if mla.q_rank is None else {"queries": (_cut(queries), mla.q_rank)}
    return {
        "latent vectors": (_cut(first + mla.kv_rank + mla.rope_dim), config.hidden_size),
        **expanded,
        "keys and values": (_cut(heads * (mla.nope_dim + mla.value_dim)), mla.kv_rank),
    }


def check_products(products: dict[str, tuple[int, int]], device: str, dtype: torch.dtype) -> CheckResult:
    """Rows of every product of a layer and of the head, forward and gradient by the input."""
    name, bad = f"model linear {probes.short(dtype)}", []
    for product, (columns, inner) in products.items():
        weight = probes.normal((columns, inner), dtype, device)
        batches = BATCHES if columns * inner <= _WORK else (1, 25, 100)
        x, dy = (probes.normal((max(batches), width), dtype, device, seed=1) for width in (inner, columns))
        whole = _with_gradient(x, weight, dy)
        for rows in batches:
            for start in (0, max(batches) - rows):
                part = slice(start, start + rows)
                if not all(
                    probes.same(a[part], b)
                    for a, b in zip(whole, _with_gradient(x[part], weight, dy[part]), strict=True)
                ):
                    bad.append(f"{product} ({columns} x {inner}), {rows} rows")
    if bad:
        return error(name, f"rows change with the number of rows: {probes.some(bad)}", probes.REPORT)
    text = ", ".join(f"{columns} x {inner}" for columns, inner in dict.fromkeys(products.values()))
    return ok(name, f"rows and their gradients have the same bits in batches of 1 to {max(BATCHES)}: {text}")


def _with_gradient(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = linear(leaf, weight)
    (gradient,) = torch.autograd.grad(out, leaf, dy)
    return out.detach(), gradient


def _cut(columns: int) -> int:
    """A width with the same whole panels or none, and the same remainder."""
    return columns if columns <= 2 * COLUMNS else COLUMNS + columns % COLUMNS


def _own_dtype(config: ModelConfig) -> torch.dtype:
    own = getattr(torch, str(config.raw.get("dtype") or config.raw.get("torch_dtype") or "float32"), None)
    return own if own in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
