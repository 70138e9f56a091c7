"""`actor_rollout_ref.ref.*`: the reference policy of a KL term."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.config.fields import opt, section


@dataclass(frozen=True)
class RefFSDPConfig:
    param_offload: bool = opt(False, "Keep the reference's weights in pinned host memory while it computes nothing.")


@dataclass(frozen=True)
class RefSection:
    log_prob_max_token_len_per_gpu: int | None = opt(
        None, "Tokens per reference forward; null takes actor.ppo_max_token_len_per_gpu.", verl=16384, ge=1
    )
    fsdp_config: RefFSDPConfig = section(RefFSDPConfig, "Where its weights are.")
