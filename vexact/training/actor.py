"""The policy being trained: packs sequences, computes the loss, steps, and hands out its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from vexact import interrupt
from vexact.algorithms import Denominators
from vexact.models import CausalLM
from vexact.ops.linear_cross_entropy import TrainedCrossEntropy
from vexact.training import one_pass
from vexact.training.batch import PackedBatch, PolicyTargets, TokenSequence, policy_targets, token_sequence
from vexact.training.config import ActorConfig
from vexact.training.finite import check_numbers, nonfinite_state, why_skipped
from vexact.training.forward import by_sequence, group_batch, micro_batches, prepare, score, token_scores
from vexact.training.ledger import Ledger, checksums
from vexact.training.loss import MiniBatchMetrics, micro_batch_loss
from vexact.training.optimizer import Optimizer, unsharded
from vexact.training.ranks import Ranks
from vexact.training.redraw import Redraw
from vexact.training.state import ActorState, gather_state, restore_state
from vexact.types import TrainSequence

log = logging.getLogger(__name__)
Audit = Callable[[list[int], list[np.ndarray]], None]


class Scored(NamedTuple):
    """Sequences by index, and the log-probabilities of each, fp32 (R,)."""

    indices: list[int]
    logprobs: list[np.ndarray]


class Actor:
    """Trains ``model`` in place. With several ranks every rank makes the same calls with its own sequences.

    The rollout's log-probabilities are the old log-probabilities, so there is no pass that recomputes them. In the
    first optimizer step of an ``update`` the forward must reproduce them bit for bit; the audit callback checks it.
    """

    def __init__(self, model: CausalLM, config: ActorConfig, device: torch.device | str | None = None) -> None:
        """Raises ValueError when the mini-batch cannot be split over the ranks, or sharding is off but needed."""
        self.config, self.model = config, model
        self.one_pass = one_pass.applies(config, model.config)
        self.ranks = Ranks.of_process(torch.device(device) if device is not None else model.lm_head_weight.device)
        if config.ppo_mini_batch_size % self.ranks.world_size:
            raise ValueError(
                f"actor.ppo_mini_batch_size={config.ppo_mini_batch_size} sequences do not divide evenly over "
                f"{self.ranks.world_size} ranks; make it a multiple of {self.ranks.world_size}"
            )
        if config.agg_mode != config.loss_agg_mode:
            given, fixed = config.loss_agg_mode, config.agg_mode
            log.warning("actor.loss_agg_mode=%s is not used: %s aggregates by %s", given, config.loss_mode, fixed)
        model.gradient_checkpointing = config.enable_gradient_checkpointing
        prepare(model, self.ranks, config.torch_dtype, config.fsdp)
        self.optimizer = Optimizer(model.parameters(), config.optim)
        self.num_updates = 0
        self.skipped_in_a_row = 0  # optimizer steps, over all updates of this process
        self.problems: list[str] = []  # of the last update: why steps were skipped, what is no longer finite

    def update(
        self,
        sequences: Sequence[TrainSequence],
        audit: Audit | None = None,
        *,
        ledger: Ledger | None = None,
        redraw: Redraw | None = None,
        every_token: bool = False,
    ) -> dict[str, float]:
        """One PPO update: ``ppo_epochs`` passes in mini-batches, one optimizer step each.

        ``audit(indices, logprobs)`` is called once per rank, after the first mini-batch's backward and before any
        weight changes, with this rank's sequence indices and their training log-probabilities (fp32 (R,) arrays, same
        order). What it raises leaves the weights untouched. The indices are those of the first mini-batch, or with
        ``every_token`` of all sequences: the others then get a forward of their own. ``redraw``, made for
        ``sequences``, repeats draws in these forwards. ``ledger``, of the same sequences, was made where their
        advantages were; every optimizer step compares what its loss reads with it.

        A step whose loss or gradient norm is not finite is skipped: nothing changes. Returns the means over the steps
        taken by verl's metric names, plus ``actor/skipped_steps``, ``actor/skipped_in_a_row`` (the longest series that
        reaches into this update), ``actor/nonfinite_tensors`` (weights and moments) and ``timing_s/audit_forward``;
        ``problems`` says more.

        Raises:
            ValueError: a sequence does not fit the token budget, lacks reference log-probabilities, or holds numbers
                that are not finite.
            LedgerError: the loss reads something else than the ledger says.
        """
        self._check(sequences)
        ledger = Ledger(sequences) if ledger is None else ledger
        ledger.require(sequences)
        lr = self.config.optim.lr_at(self.num_updates)
        self.optimizer.set_lr(lr)
        steps, longest, audit_seconds, beyond = [], 0, 0.0, Scored([], [])
        if audit is not None and every_token:
            started, first = perf_counter(), set(self._mini_batches(len(sequences), 0)[0])
            beyond = self._score(sequences, [i for i in range(len(sequences)) if i not in first], redraw)
            audit_seconds = perf_counter() - started
        self.problems = []
        for epoch in range(self.config.ppo_epochs):
            mini_batches = self._mini_batches(len(sequences), epoch)
            ledger.require_each_once(range(len(sequences)), [i for indices in mini_batches for i in indices])
            for indices in mini_batches:
                steps.append(self._step(sequences, indices, ledger, audit, beyond, redraw))
                longest = max(longest, self.skipped_in_a_row)
                audit = redraw = None
        self.num_updates += 1
        health = {"actor/skipped_in_a_row": float(longest), "actor/nonfinite_tensors": self._num_nonfinite()}
        means = _mean_metrics(steps) | health | {"timing_s/audit_forward": audit_seconds}
        return means | {"actor/lr": lr} | self._coefficients()

    def logprobs(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> list[np.ndarray]:
        """Log-probabilities of every response under the current weights, fp32 (R,) each; the bits of training.

        ``redraw``, made for ``sequences``, repeats draws in these forwards.
        """
        return self._score(sequences, list(range(len(sequences))), redraw).logprobs

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its model name: whole, in the compute dtype, one at a time.

        All ranks iterate together, since sharded parameters are gathered. The tensors may share the actor's memory:
        copy what outlives the next update.
        """
        for name, parameter in self.model.named_parameters():
            yield name, unsharded(parameter.detach()).to(self.config.torch_dtype)

    def named_shards(self) -> Iterator[tuple[str, Tensor, torch.Size]]:
        """Every parameter by its model name: this rank's rows as it keeps them, and the shape of all.

        Rank r has rows r * ceil(n / W) and on, ceil(n / W) of them or what is left. They share the actor's memory: copy
        what outlives the next update.
        """
        for name, parameter in self.model.named_parameters():
            rows = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            yield name, rows.detach(), parameter.shape

    def state_dict(self) -> ActorState:
        """Everything a resumed run needs for the same bits, on the CPU; all ranks call it, rank 0 gets the tensors."""
        return gather_state(self.model, self.optimizer, self.num_updates)

    def load_state_dict(self, state: ActorState) -> None:
        """Puts a state back. All ranks call it; the tensors count on rank 0 and may be absent elsewhere.

        Raises ValueError naming the parameters that do not match the model.
        """
        self.num_updates = restore_state(self.model, self.optimizer, state)

    def _score(self, sequences: Sequence[TrainSequence], indices: list[int], redraw: Redraw | None = None) -> Scored:
        """Log-probabilities of some of the sequences by a forward without gradients. All ranks call it together."""
        names = [sequences[i].sample.request_id for i in indices]
        tokens = [token_sequence(sequences[i]) for i in indices]

        def watch(batch: PackedBatch, group: list[int]) -> PackedBatch:
            return batch if redraw is None else redraw.watch(batch, [indices[i] for i in group])

        budget = self.config.ppo_max_token_len_per_gpu
        return Scored(indices, score(self.model, tokens, names, budget, self.ranks, watch))

    def _check(self, sequences: Sequence[TrainSequence]) -> None:
        (most,) = self.ranks.maximum(len(sequences))
        if most == 0:
            raise ValueError("update() got no sequences on any rank; check data.train_batch_size and filter_groups")
        for s in sequences:
            name, num_tokens = s.sample.request_id, len(s.sample.token_ids)
            if self.config.use_kl_loss and s.ref_logprobs is None:
                raise ValueError(
                    f"actor.use_kl_loss=True, but {name} has no ref_logprobs; compute them before update()"
                )
            per_token = {"logprobs": s.sample.logprobs, "min_logits": s.sample.min_logits, "advantages": s.advantages}
            if s.ref_logprobs is not None:
                per_token["ref_logprobs"] = s.ref_logprobs
            for key, values in per_token.items():
                if len(values) != num_tokens:
                    raise ValueError(f"{name} has {num_tokens} response tokens but {len(values)} {key}")
        check_numbers(sequences)

    def _num_nonfinite(self) -> float:
        found = nonfinite_state(self.model, self.optimizer)
        self.problems += found
        return float(self.ranks.maximum(len(found))[0])

    def _mini_batches(self, num_sequences: int, epoch: int) -> list[list[int]]:
        """This rank's indices of every mini-batch; as many on every rank, the last ones possibly short or empty.

        The order of a shuffled epoch depends on (data_loader_seed, update, epoch) only: nothing to restore on resume.
        """
        order = list(range(num_sequences))
        if self.config.shuffle:
            key = [self.config.data_loader_seed, self.num_updates, epoch]
            order = np.random.default_rng(key).permutation(num_sequences).tolist()
        size = self.config.ppo_mini_batch_size // self.ranks.world_size
        (count,) = self.ranks.maximum(math.ceil(num_sequences / size))
        return [order[i * size : (i + 1) * size] for i in range(count)]

    def _step(
        self,
        sequences: Sequence[TrainSequence],
        indices: list[int],
        ledger: Ledger,
        audit: Audit | None,
        beyond: Scored,
        redraw: Redraw | None,
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch; the audit sees it together with what was scored ``beyond`` it."""
        chosen = [sequences[i] for i in indices]
        tokens = [token_sequence(s) for s in chosen]
        denominators = self._denominators(tokens)
        names = [s.sample.request_id for s in chosen]
        budget, balance = self.config.ppo_max_token_len_per_gpu, self.config.balance_micro_batches
        metrics = MiniBatchMetrics()
        self.optimizer.zero_grad()
        groups = micro_batches(tokens, names, budget, balance, self.ranks)
        values, read = [], []
        for group in groups:
            batch = group_batch(tokens, group, self.ranks.device)
            if redraw is not None:
                batch = redraw.watch(batch, [indices[i] for i in group])
            logprobs, checksum = self._accumulate(chosen, batch, group, denominators, metrics)
            values.append(logprobs)
            read += checksum
        if indices:
            order = [indices[i] for group in groups for i in group]
            ledger.require_each_once(indices, order)
            ledger.compare(order, torch.cat(read, dim=1).cpu())
        if audit is not None:
            audit(indices + beyond.indices, by_sequence(values, tokens, groups) + beyond.logprobs)
        sums = dict(zip(metrics.names, self.ranks.total_of(metrics.sums).tolist(), strict=True))
        norm = self.optimizer.step(self.config.grad_clip) if math.isfinite(sums["loss"]) else math.nan
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            self.problems.append(why_skipped(sums["loss"], self.model))
        return sums | {"grad_norm": norm}

    def _accumulate(
        self,
        chosen: Sequence[TrainSequence],
        batch: PackedBatch,
        group: list[int],
        denominators: Denominators,
        metrics: MiniBatchMetrics,
    ) -> tuple[Tensor, list[Tensor]]:
        """Forward and backward of one micro-batch; returns its log-probabilities (R,), and what a ledger compares."""
        interrupt.check()
        read = []
        if group:
            targets = policy_targets([chosen[i] for i in group], self.config.use_kl_loss, self.ranks.device)
            read.append(checksums(batch.targets.token_ids, targets, batch.response_lengths))
        else:
            targets = PolicyTargets(*[torch.zeros_like(batch.targets.min_logit)] * 3)
        weight = 1.0 if group else 0.0
        # FSDP averages gradients over the ranks, but the loss already has global denominators.
        scale = weight * self.ranks.world_size
        if self.one_pass:
            batch = one_pass.with_derivative(batch, targets, self.config, denominators, scale)
        scores = token_scores(self.model, batch)
        loss, shares = micro_batch_loss(scores, batch, targets, self.config, denominators)
        metrics.add(shares, weight)
        if isinstance(scores, TrainedCrossEntropy):
            scores.surrogate.backward()
        else:
            (loss * scale).backward()
        return scores.logprobs.detach(), read

    def _denominators(self, tokens: Sequence[TokenSequence]) -> Denominators:
        local_tokens = sum(len(s.response) for s in tokens)
        num_tokens, num_sequences = self.ranks.total(local_tokens, len(tokens))
        return Denominators(num_tokens, num_sequences, self.config.loss_scale_factor)

    def _coefficients(self) -> dict[str, float]:
        return {"actor/kl_coef": self.config.kl_loss_coef} if self.config.use_kl_loss else {}


def _mean_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that were taken (over all of them if none was), and how many were skipped."""
    taken = [step for step in steps if math.isfinite(step["grad_norm"])]
    counted = taken or steps
    means = {f"actor/{name}": sum(step[name] for step in counted) / len(counted) for name in counted[0]}
    return means | {"actor/skipped_steps": float(len(steps) - len(taken))}
