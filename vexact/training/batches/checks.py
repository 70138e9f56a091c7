"""What an update is given, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from vexact.training.state.finite import check_numbers
from vexact.types import TrainSequence


def check_sequences(sequences: Sequence[TrainSequence], use_kl_loss: bool) -> None:
    """Raises ValueError for what an update could not learn from, by the name of its request."""
    if not sequences:
        raise ValueError("update() got no sequences; check data.train_batch_size and filter_groups")
    for s in sequences:
        name, num_tokens = s.sample.request_id, len(s.sample.token_ids)
        if use_kl_loss and s.ref_logprobs is None:
            raise ValueError(f"actor.use_kl_loss=True, but {name} has no ref_logprobs; compute them before update()")
        per_token = {"logprobs": s.sample.logprobs, "min_logits": s.sample.min_logits, "advantages": s.advantages}
        optional = {"ref_logprobs": s.ref_logprobs, "recomputed_logprobs": s.recomputed_logprobs}
        per_token |= {key: values for key, values in optional.items() if values is not None}
        for key, values in per_token.items():
            if len(values) != num_tokens:
                raise ValueError(f"{name} has {num_tokens} response tokens but {len(values)} {key}")
    check_numbers(sequences)
