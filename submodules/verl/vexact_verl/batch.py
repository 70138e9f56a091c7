"""Between verl's jagged batches and vexact's packed ones."""

from __future__ import annotations

from itertools import pairwise

import torch
from tensordict import TensorDict
from torch import Tensor

from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.types import inverse_temperature
from vexact_verl.draws import read_draws


class JaggedBatch:
    """B sequences of verl's and their packed tensors. Scores are computed for the response tokens only.

    Without ``responses``, and with ``every_token``, all tokens but the first of each sequence are the response.
    """

    def __init__(self, data: TensorDict, device: torch.device, every_token: bool = False) -> None:
        """Raises ValueError for input that is not text, and as ``read_draws``."""
        ids = data["input_ids"]
        assert ids.is_nested, "verl's engines get jagged input"
        self._offsets = ids.offsets()
        ends = self._offsets.tolist()
        whole = [ids.values()[start:end].tolist() for start, end in pairwise(ends)]
        prompts = _prompt_lengths(data) if "responses" in data and not every_token else [1] * len(whole)
        draws = read_draws(data, [len(tokens) - prompt for tokens, prompt in zip(whole, prompts, strict=True)])
        _require_text(data, [len(tokens) for tokens in whole])
        sequences = [
            TokenSequence(tokens[:prompt], tokens[prompt:], inverse_temperature(draw.temperature), draw.min_logits)
            for tokens, prompt, draw in zip(whole, prompts, draws, strict=True)
        ]
        self.packed: PackedBatch = pack_tokens(sequences, device)
        # packed sequences lack their last token, so that each begins one row earlier for every one before it
        earlier = torch.arange(len(whole), device=device).repeat_interleave(self.packed.response_lengths)
        self._rows = self.packed.targets.rows + earlier

    def jagged(self, scores: Tensor) -> Tensor:
        """Scores (R,) of response tokens -> a value for every token, jagged (B, j), each at the token before its own,
        as verl wants them; 0 elsewhere."""
        values = scores.new_zeros(int(self._offsets[-1])).index_copy(0, self._rows, scores)
        return torch.nested.nested_tensor_from_jagged(values, self._offsets)


def _prompt_lengths(data: TensorDict) -> list[int]:
    prompts = data["prompts"]
    if prompts.is_nested:
        return list(prompts.offsets().diff().tolist())
    return list(data["attention_mask"][:, : prompts.shape[1]].sum(dim=1).tolist())


def _require_text(data: TensorDict, lengths: list[int]) -> None:
    positions = data.get("position_ids", None)
    if positions is None:
        return
    counted = torch.cat([torch.arange(length) for length in lengths])
    if positions.dim() != 2 or not torch.equal(positions.values().cpu().long(), counted):
        raise ValueError("position_ids must count from 0 in every sequence; actor.strategy=vexact trains text models")
