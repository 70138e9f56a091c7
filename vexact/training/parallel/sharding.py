"""Sharding a model over the ranks with FSDP2, and reading a checkpoint into the shards."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from vexact.models import CausalLM, load_model
from vexact.models.layers.moe import Router
from vexact.models.load import load_parts
from vexact.training.parallel.ranks import Ranks, first_row, local, lone_mesh


def prepare(model: CausalLM, ranks: Ranks, dtype: torch.dtype, fsdp: bool | None) -> None:
    """Shards ``model`` in place when asked to, or when several ranks or a second dtype need it (``ActorConfig.fsdp``).

    A model that is sharded already is left alone. Raises ValueError when sharding is switched off although it is
    needed.
    """
    if isinstance(model, FSDPModule):
        return
    model_dtype = next(model.parameters()).dtype
    needed = ranks.mesh is not None or model_dtype != dtype
    if fsdp is False and needed:
        raise ValueError(
            f"actor.fsdp=False needs one rank and a model in {dtype}; "
            f"there are {ranks.world_size} rank(s) and the model is in {model_dtype}"
        )
    if fsdp or needed:
        shard(model, ranks, dtype)


def shard(model: CausalLM, ranks: Ranks, dtype: torch.dtype) -> None:
    """Wraps every layer and the root with FSDP2, in place.

    Parameters keep their dtype as the master copy, compute in ``dtype`` and reduce gradients in fp32. Inputs are never
    cast: temperatures and rotary tables stay fp32.
    """
    mesh = lone_mesh(ranks) if ranks.mesh is None else ranks.mesh
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    biases = _shard_router_biases(model, ranks, mesh)
    for layer in model.parallel_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=biases)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=biases)
    # said of every layer's output in every process, in case that somebody writes into it: nobody does
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _shard_router_biases(model: CausalLM, ranks: Ranks, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Divides them as FSDP2 would, which would also cast them: a router gathers its own, in fp32."""
    biases = set()
    for module in model.modules():
        if isinstance(module, Router) and module.bias is not None:
            bias, first = module.bias.detach(), first_row(len(module.bias), ranks)
            rows = bias[first : first + -(-len(bias) // mesh.size())].clone()
            sharded = DTensor.from_local(
                rows, mesh, [Shard(0)], run_check=False, shape=bias.shape, stride=bias.stride()
            )
            module.bias = nn.Parameter(sharded, requires_grad=False)
            biases.add(module.bias)
    return biases


def load_sharded_model(
    path: str | Path,
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    master_dtype: torch.dtype = torch.float32,
    ops: str = "invariant",
    attn_impl: str = "triton-invariant",
) -> CausalLM:
    """``load_model`` for the ranks of a trainer: every rank reads its own rows, tensor by tensor, and holds no others.

    One rank gets the plain model. All ranks call it together.

    Args:
        dtype: what the model computes in. master_dtype: what its parameters are kept in.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``.
        PeerStopped: another rank could not read its part.
    """
    if ranks.mesh is None:
        return load_model(path, dtype=master_dtype, device=ranks.device, ops=ops, attn_impl=attn_impl)
    with ranks.together():
        return load_parts(
            path,
            lambda model: shard(model, ranks, dtype),
            lambda parameter: (local(parameter), first_row(parameter.shape[0], ranks)),
            dtype=master_dtype,
            device=ranks.device,
            ops=ops,
            attn_impl=attn_impl,
        )
