"""What VeOmni may not do with the tokens of a sequence."""

from __future__ import annotations

from veomni.distributed.parallel_state import get_parallel_state, is_parallel_state_initialized


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
