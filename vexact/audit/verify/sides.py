"""The training side of the comparison: our decoder, or a stock transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from vexact import plugins
from vexact.audit.verify.routes import RouteTap
from vexact.models import CausalLM, Targets, load_model
from vexact.models.checkpoint.index import check_one_reading
from vexact.models.hf_names import to_module
from vexact.models.opset import INVARIANT_ATTENTION
from vexact.ops import PackedMetadata, linear_cross_entropy, token_logprobs
from vexact.swaps import make_invariant
from vexact.swaps.router import round_routers
from vexact.training.batches.batch import PackedBatch, TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

OWN_BACKENDS = ("vexact", "hf")
ATTENTION = ("triton-invariant", "sdpa")


class TrainingSide(Protocol):
    """A forward that training would run. R is the number of response tokens of a batch.

    One with an attribute ``routes``, a :class:`RouteTap`, also says which experts it chose.
    """

    def logits(self, batch: PackedBatch) -> Tensor:
        """(R, V) fp32."""
        ...

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """(R,) fp32 from the fused LM head and cross-entropy."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter's gradient by the name that a transformers module has for it."""
        ...

    def zero_grad(self) -> None: ...


class VexactSide:
    """The decoder and the fused head of our trainer."""

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.routes = RouteTap(model)

    def logits(self, batch: PackedBatch) -> Tensor:
        hidden = self.model(batch.input_ids, batch.positions, batch.attention)
        return self.model.logits(hidden.index_select(0, batch.targets.rows))

    def logprobs(self, batch: PackedBatch) -> Tensor:
        return token_scores(self.model, batch).logprobs

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return to_module(self.model.config, ((name, _gradient(parameter)) for name, parameter in trained))

    def zero_grad(self) -> None:
        self.model.zero_grad(set_to_none=True)


class HfSide:
    """A transformers model, stock or made invariant; packed sequences are told apart by positions that restart."""

    def __init__(self, hf: Any) -> None:
        self.hf = hf
        self.routes = RouteTap(hf)
        self._head_is_last = False  # not known yet

    def logits(self, batch: PackedBatch) -> Tensor:
        rows = batch.targets.rows
        return self.hf(**_packed_row(batch), logits_to_keep=rows).logits[0].float()

    def logprobs(self, batch: PackedBatch) -> Tensor:
        """Raises ValueError for a model that changes the logits of its head, which the fused head would not do."""
        targets = batch.targets
        hidden = self.hf.base_model(**_packed_row(batch)).last_hidden_state[0].index_select(0, targets.rows)
        head = self.hf.get_output_embeddings()
        if not self._head_is_last:
            with torch.no_grad():
                self._head_is_last = torch.equal(head(hidden).float(), self.logits(batch))
        if not self._head_is_last or head.bias is not None:
            raise ValueError(
                f"{type(self.hf).__name__} {'changes the logits of' if head.bias is None else 'has a bias in'} its "
                "head, which the fused head would leave out; use --use_fused_lce false"
            )
        weight = head.weight
        return linear_cross_entropy(
            hidden, weight, targets.token_ids, targets.inv_temperature, targets.min_logit
        ).logprobs

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, _gradient(parameter)) for name, parameter in self.hf.named_parameters())

    def zero_grad(self) -> None:
        self.hf.zero_grad(set_to_none=True)


def _packed_row(batch: PackedBatch) -> dict[str, Any]:
    return {"input_ids": batch.input_ids[None], "position_ids": batch.positions[None], "use_cache": False}


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def load_side(backend: str, path: Path, dtype: torch.dtype, device: torch.device, attn_impl: str) -> TrainingSide:
    """A backend that is not ours comes from the package that provides it (``vexact.plugins``), by a function like this
    one without ``backend``.

    Raises:
        ValueError: an unknown attention, or a backend that no installed package provides.
    """
    if attn_impl not in ATTENTION:
        raise ValueError(f"--attn_impl={attn_impl}: use one of {', '.join(ATTENTION)}")
    if backend == "vexact":
        return VexactSide(load_model(path, dtype=dtype, device=device, attn_impl=attn_impl))
    if backend == "hf":
        stock = load_hf(path, dtype, device, "sdpa")
        round_routers(stock)
        return HfSide(make_invariant(stock) if attn_impl in INVARIANT_ATTENTION else stock)
    load_foreign = plugins.load(plugins.VERIFY_BACKENDS, backend, "--model_backend", OWN_BACKENDS)
    side: TrainingSide = load_foreign(path, dtype, device, attn_impl)
    return side


def load_hf(path: Path, dtype: torch.dtype, device: torch.device, attn_impl: str) -> Any:
    """A stock transformers model in evaluation mode.

    Raises:
        ValueError: transformers cannot load the checkpoint, or would read other weights than we do.
    """
    from transformers import AutoModelForCausalLM

    check_one_reading(path)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_impl, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of any class: what our loader takes, transformers may still refuse
        raise ValueError(f"transformers cannot load {path}: {error}") from error
    return model.to(device).eval()


def load_reference(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """:func:`load_hf`, to compare with as it is.

    Raises:
        ValueError: as it does, or transformers fails to compute with what it has loaded.
    """
    model = load_hf(path, dtype, device, "sdpa")
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # its code has limits of its own, such as two experts in a group of DeepSeek-V3's router
        raise ValueError(
            f"transformers loads {path}, but fails to compute with it ({type(error).__name__}: {error}); it is no "
            "reference for this model"
        ) from error
    return model


def hf_logits(hf: Any, batch: PackedBatch) -> Tensor:
    """(R, V) of a stock model for a batch that holds one sequence, in its dtype's values but as fp32."""
    return hf(input_ids=batch.input_ids[None], use_cache=False).logits[0].index_select(0, batch.targets.rows).float()


def digests_of(side: TrainingSide, batch: PackedBatch) -> Tensor | None:
    """(R,) int64, the experts of the rows that predict the response tokens, in the side's last forward; None without
    experts, or for a side that does not say."""
    tap: RouteTap | None = getattr(side, "routes", None)
    return None if tap is None or tap.digests is None else tap.digests[batch.targets.rows]


def scorer(side: TrainingSide, fused: bool) -> Callable[[PackedBatch], Tensor]:
    """Log-probabilities (R,) of a batch: by the fused head, or from logits and the sampler's definition."""
    if fused:
        return side.logprobs
    return lambda batch: logprobs_of(side.logits(batch), batch)


def logprobs_of(logits: Tensor, batch: PackedBatch) -> Tensor:
    """(R, V) to (R,)."""
    targets = batch.targets
    return token_logprobs(logits, targets.token_ids, targets.inv_temperature, targets.min_logit).logprobs


def show_targets(batch: PackedBatch, logits: Tensor) -> None:
    """Gives the batch's probe, if it has one, its rows of the targets' logits (R, V)."""
    probe = batch.targets.probe
    if probe is not None:
        probe.see(logits.index_select(0, probe.rows), slice(0, len(probe.rows)))


def pack_padded(sequences: Sequence[TokenSequence], device: torch.device) -> PackedBatch:
    """A batch with padding: every sequence is filled up at its end to the longest, each row a sequence of its own.

    Causal attention never looks at what comes after a token, so the padding cannot reach a response.
    """
    longest = max(s.num_input_tokens for s in sequences)
    plain = pack_tokens(sequences, device)
    rows, ids, start = [], torch.zeros(len(sequences), longest, dtype=torch.int64, device=device), 0
    for row, sequence in enumerate(sequences):
        length = sequence.num_input_tokens
        ids[row, :length] = plain.input_ids[start : start + length]
        start += length
        first = row * longest + len(sequence.prompt) - 1
        rows.append(torch.arange(first, first + len(sequence.response), device=device))
    lengths = [longest] * len(sequences)
    targets = plain.targets
    return PackedBatch(
        input_ids=ids.flatten(),
        positions=torch.arange(longest, device=device).repeat(len(sequences)),
        attention=PackedMetadata.from_lengths(lengths, device),
        targets=Targets(torch.cat(rows), targets.token_ids, targets.inv_temperature, targets.min_logit),
        response_lengths=plain.response_lengths,
    )
