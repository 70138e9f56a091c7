"""Sharding a model over the ranks with FSDP2, and reading a checkpoint into the shards."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from vexact.models import CausalLM, ModelConfig, load_model
from vexact.models.layers.moe import MoE, Router
from vexact.models.load import load_parts
from vexact.training.parallel.expert_parallel import KEY as EXPERTS_KEY
from vexact.training.parallel.expert_parallel import DistributedExperts, ExpertRanks, check_expert_size
from vexact.training.parallel.ranks import Ranks, first_row, local, lone_mesh


def prepare(
    model: CausalLM, ranks: Ranks, dtype: torch.dtype, fsdp: bool | None, expert_parallel_size: int = 1
) -> None:
    """Shards ``model`` in place when asked to, or when several ranks or a second dtype need it (``ActorConfig.fsdp``).

    A model that is sharded already is left alone. Raises ValueError when sharding is switched off although it is
    needed, or the experts are not shared as asked, or cannot be.
    """
    check_expert_size(expert_parallel_size, ranks.world_size, model.config)
    if isinstance(model, FSDPModule):
        if (found := _expert_parallel_size(model)) != expert_parallel_size:
            raise ValueError(
                f"{EXPERTS_KEY}={expert_parallel_size}, but the model was sharded for {found}; pass "
                "load_sharded_model the same expert_parallel_size"
            )
        return
    model_dtype = next(model.parameters()).dtype
    needed = ranks.mesh is not None or model_dtype != dtype
    if fsdp is False and needed:
        raise ValueError(
            f"actor.fsdp=False needs one rank and a model in {dtype}; "
            f"there are {ranks.world_size} rank(s) and the model is in {model_dtype}"
        )
    if fsdp or needed:
        shard(model, ranks, dtype, ExpertRanks.of_process(expert_parallel_size, ranks.group))


def shard(model: CausalLM, ranks: Ranks, dtype: torch.dtype, sharing: ExpertRanks | None = None) -> None:
    """Wraps every layer and the root with FSDP2, in place.

    Parameters keep their dtype as the master copy, compute in ``dtype`` and reduce gradients in fp32. Inputs are never
    cast: temperatures and rotary tables stay fp32. Experts that ranks are ``sharing`` are divided alike, not wrapped.
    """
    mesh = lone_mesh(ranks) if ranks.mesh is None else ranks.mesh
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    own = _shard_for_themselves(model, ranks, mesh, sharing)
    for layer in model.parallel_layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=own)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=own)
    # said of every layer's output in every process, in case that somebody writes into it: nobody does
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


def _shard_for_themselves(
    model: CausalLM, ranks: Ranks, mesh: DeviceMesh, sharing: ExpertRanks | None
) -> set[nn.Parameter]:
    """What FSDP2 is to ignore, divided as it would: a router gathers its bias, which FSDP2 would cast, in fp32, and
    shared experts what their group needs."""

    def sharded(parameter: nn.Parameter) -> nn.Parameter:
        whole, first = parameter.detach(), first_row(len(parameter), ranks)
        rows = whole[first : first + -(-len(whole) // mesh.size())].clone()
        divided = DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
        return nn.Parameter(divided, requires_grad=parameter.requires_grad)

    own: set[nn.Parameter] = set()
    for module in list(model.modules()):
        if isinstance(module, Router) and module.bias is not None:
            module.bias = sharded(module.bias)
            own.add(module.bias)
        if isinstance(module, MoE) and sharing is not None:
            experts = DistributedExperts(module.experts, sharing, sharded)
            own.update(experts.parameters())
            module.experts = experts
    return own


def _expert_parallel_size(model: CausalLM) -> int:
    return next((m.ranks.size for m in model.modules() if isinstance(m, DistributedExperts)), 1)


def load_sharded_model(
    path: str | Path,
    ranks: Ranks,
    dtype: torch.dtype,
    *,
    master_dtype: torch.dtype = torch.float32,
    ops: str = "invariant",
    attn_impl: str = "triton-invariant",
    expert_parallel_size: int = 1,
) -> CausalLM:
    """``load_model`` for the ranks of a trainer: every rank reads its own rows, tensor by tensor, and holds no others.

    One rank gets the plain model. All ranks call it together.

    Args:
        dtype: what the model computes in. master_dtype: what its parameters are kept in. expert_parallel_size: groups
            of ranks that share its experts.

    Raises:
        FileNotFoundError, ValueError: as ``load_model``.
        PeerStopped: another rank could not read its part.
    """
    if ranks.mesh is None:
        return load_model(path, dtype=master_dtype, device=ranks.device, ops=ops, attn_impl=attn_impl)
    with ranks.together():
        check_expert_size(expert_parallel_size, ranks.world_size, ModelConfig.from_hf_dir(path))
    sharing = ExpertRanks.of_process(expert_parallel_size, ranks.group)
    with ranks.together():
        return load_parts(
            path,
            lambda model: shard(model, ranks, dtype, sharing),
            lambda parameter: (local(parameter), first_row(parameter.shape[0], ranks)),
            dtype=master_dtype,
            device=ranks.device,
            ops=ops,
            attn_impl=attn_impl,
        )
