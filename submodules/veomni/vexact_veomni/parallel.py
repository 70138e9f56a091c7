"""What VeOmni may not spread over ranks."""

from __future__ import annotations

from veomni.distributed.parallel_state import get_parallel_state, is_parallel_state_initialized


def refuse_expert_parallelism() -> None:
    """
    Raises:
        ValueError: experts are spread over ranks, whose tokens our operators would not fetch.
    """
    if is_parallel_state_initialized() and get_parallel_state().ep_enabled:
        raise ValueError(
            f"ep_size={get_parallel_state().ep_size}: vexact's experts do not fetch tokens from other ranks under "
            "VeOmni; set it to 1 (vexact's own trainer has actor.fsdp_config.expert_parallel_size)"
        )


def refuse_sequence_parallelism() -> None:
    """
    Raises:
        ValueError: Ulysses or context parallelism is on, which another attention than VeOmni's own would not see.
    """
    if not is_parallel_state_initialized():
        return
    state = get_parallel_state()
    if state.sp_enabled:
        raise ValueError(
            f"ulysses_size={state.ulysses_size}, cp_size={state.cp_size}: vexact's attention does not gather the "
            "slices of a sequence from other ranks; set both to 1 (vexact's own trainer has "
            "actor.ulysses_sequence_parallel_size)"
        )
