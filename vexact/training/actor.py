"""The policy being trained: packs sequences, computes the loss, steps, and hands out its weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vexact import interrupt
from vexact.algorithms import Denominators, LossScales
from vexact.config.sections.model import recomputed_layers
from vexact.models import CausalLM, parameter_dtype
from vexact.ops.linear_cross_entropy import TrainedCrossEntropy
from vexact.training.batches.batch import PackedBatch, PolicyTargets, policy_targets, token_sequence
from vexact.training.batches.checks import check_sequences
from vexact.training.batches.ledger import Ledger, checksums
from vexact.training.batches.mini_batches import mini_batches
from vexact.training.batches.packing import idle_share, pack
from vexact.training.config import ActorConfig
from vexact.training.optim.offload import park
from vexact.training.optim.optimizer import Optimizer
from vexact.training.parallel.gradient_sum import GradientSum
from vexact.training.parallel.ranks import Ranks, unsharded
from vexact.training.parallel.sharding import prepare
from vexact.training.passes import one_pass
from vexact.training.passes.correction import SampleCorrection, packed_scales
from vexact.training.passes.experts import ExpertWatch, check_experts, load_metrics, update_router_bias
from vexact.training.passes.forward import Scored, by_sequence, fingerprint, group_batch, join, routed_scores, score
from vexact.training.passes.loss import MiniBatchMetrics, mean_metrics, micro_batch_loss
from vexact.training.passes.redraw import Redraw
from vexact.training.protocol import Audit
from vexact.training.state.finite import nonfinite_state, why_skipped
from vexact.training.state.gathered import ActorState, gather_state, restore_state
from vexact.training.state.sharded import blank_state, install_state, sharded_state
from vexact.types import TrainSequence

log = logging.getLogger(__name__)


class Actor:
    """Trains ``model`` in place. With several ranks every rank makes the same calls with the same sequences.

    Which micro-batches a rank computes follows from their index. Weights, moments and log-probabilities have the same
    bits on any number of ranks.

    The rollout's log-probabilities are the old log-probabilities, so there is no pass that recomputes them. In the
    first optimizer step of an ``update`` the forward must reproduce them bit for bit; the audit callback checks it.
    """

    def __init__(
        self,
        model: CausalLM,
        config: ActorConfig,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """
        Args:
            group: the ranks that train; None for all of the default process group, or for a lone process.

        Raises:
            ValueError: sharding is off but needed, several ranks are to train weights that are not float32, the
                ranks or the attention heads cannot be divided into ``ulysses_sequence_parallel_size``, or the ranks or
                the experts into ``expert_parallel_size``, or experts are to be balanced or layers recomputed that the
                model does not have.
        """
        self.config, self.model = config, model
        self.one_pass = one_pass.applies(config, model.config)
        self.aux_coefficient = check_experts(config, model.config)
        where = torch.device(device) if device is not None else model.lm_head_weight.device
        self.ranks = Ranks.of_process(where, group).sharing(config.ulysses_sequence_parallel_size, model.config)
        master_dtype = model.lm_head_weight.dtype
        if self.ranks.mesh is not None and master_dtype != torch.float32:
            raise ValueError(
                f"the model is in {master_dtype}; several ranks sum gradients in float32 and train weights in float32"
            )
        if config.agg_mode != config.loss_agg_mode:
            given, fixed = config.loss_agg_mode, config.agg_mode
            log.warning("actor.loss_agg_mode=%s is not used: %s aggregates by %s", given, config.loss_mode, fixed)
        model.recomputed_layers = recomputed_layers(
            config.enable_gradient_checkpointing, config.recompute_num_layers, model.config.num_layers
        )
        prepare(model, self.ranks, config.torch_dtype, config.fsdp, config.expert_parallel_size)
        self.optimizer = Optimizer(model.parameters(), config.optim, self.ranks, config.optimizer_offload)
        self.gradients = GradientSum(model, self.ranks.world_size)
        self._parked = park(model, config.param_offload)
        self.num_updates = 0
        self.skipped_in_a_row = 0  # optimizer steps, over all updates of this process
        self.problems: list[str] = []  # of the last update on this rank: why steps were skipped, what is not finite

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

        ``audit(indices, logprobs, routes)`` is called once per rank, after the first mini-batch's backward and before
        any weight changes, with the sequence indices that this rank has computed (maybe none), their training
        log-probabilities (fp32 (R,) arrays, same order), and what experts their rows chose (int64 (R,) arrays, or None
        for a model without). What it raises leaves the weights of all ranks untouched. The
        indices are a part of the first mini-batch, or with ``every_token`` of all sequences: the others then get a
        forward of their own. ``redraw``, made for ``sequences``, repeats draws in these forwards. ``ledger``, of the
        same sequences, was made where their advantages were; every optimizer step compares what its loss reads with
        it.

        A step whose loss or gradient norm is not finite is skipped: nothing changes. Returns the means over the steps
        taken by verl's metric names, plus ``actor/skipped_steps``, ``actor/skipped_in_a_row`` (the longest series that
        reaches into this update), ``actor/nonfinite_tensors`` (weights and moments) and ``timing_s/audit_forward``;
        ``problems`` says more.

        Raises:
            ValueError: a sequence does not fit the token budget, lacks reference log-probabilities, or holds numbers
                that are not finite.
            LedgerError: the loss reads something else than the ledger says.
            PeerStopped: another rank has raised one of these, or its audit has; no weight was changed by this step.
        """
        with self.ranks.together():
            check_sequences(sequences, self.config.use_kl_loss)
            ledger = Ledger(sequences) if ledger is None else ledger
            ledger.require(sequences)
        self.ranks.require_equal("sequences", ledger.fingerprint)
        with self._parked.resident():
            try:
                return self._update(sequences, audit, ledger, redraw, every_token)
            finally:
                self.gradients.release()

    def logprobs(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> list[np.ndarray]:
        """Log-probabilities of every response under the current weights, fp32 (R,) each; the bits of training.

        All of them on every rank. ``redraw``, made for ``sequences``, repeats draws in the forwards of this rank.
        """
        return self.rescore(sequences, redraw).logprobs

    def rescore(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> Scored:
        """``logprobs``, and what experts the rows chose."""
        return join(self.score(sequences, redraw), [len(s.sample.token_ids) for s in sequences], self.ranks)

    def score(self, sequences: Sequence[TrainSequence], redraw: Redraw | None = None) -> Scored:
        """This rank's share of ``rescore``."""
        tokens = [token_sequence(s) for s in sequences]
        self.ranks.require_equal("sequences", fingerprint(tokens, [s.sample.request_id for s in sequences]))
        with self._parked.resident():
            return self._score(sequences, list(range(len(sequences))), redraw)

    def resident(self) -> AbstractContextManager[None]:
        """With ``param_offload``, ``model``'s parameters hold their values inside of this context only."""
        return self._parked.resident()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by its model name: whole, in its dtype of the forward, one at a time.

        All ranks iterate together, since sharded parameters are gathered. The tensors may share the actor's memory:
        copy what outlives the next update.
        """
        with self._parked.resident():
            for name, parameter in self.model.named_parameters():
                whole = unsharded(parameter.detach())
                yield name, whole.to(parameter_dtype(name, self.config.torch_dtype), copy=self.config.param_offload)

    def named_shards(self) -> Iterator[tuple[str, Tensor, torch.Size]]:
        """Every parameter by its model name: this rank's rows as it keeps them, and the shape of all.

        Rank r has rows r * ceil(n / W) and on, ceil(n / W) of them or what is left. They are on the device, with
        ``param_offload`` one by one; they may share the actor's memory: copy what outlives the next update.
        """
        for (name, parameter), rows in zip(self.model.named_parameters(), self._parked.rows(), strict=True):
            yield name, rows.to(self.ranks.device, non_blocking=True), parameter.shape

    def state_dict(self) -> ActorState:
        """Everything a resumed run needs for the same bits, on the CPU; all ranks call it, rank 0 gets the tensors."""
        with self._parked.resident():
            return gather_state(self.model, self.optimizer, self.ranks, self.num_updates)

    def load_state_dict(self, state: ActorState) -> None:
        """Puts a state back. All ranks call it; the tensors count on rank 0 and may be absent elsewhere.

        Raises ValueError naming the parameters that do not match the model (PeerStopped on other ranks).
        """
        with self._parked.resident():
            self.num_updates = restore_state(self.model, self.optimizer, self.ranks, state)

    def sharded_state(self) -> dict[str, Tensor]:
        """The same as ``state_dict``, each rank with its own rows, as ``torch.distributed.checkpoint`` takes it.

        By key: ``num_updates``, and for a parameter ``weight.NAME`` and, after the first step, ``exp_avg.NAME``,
        ``exp_avg_sq.NAME`` and ``num_steps.NAME``; counts are int64 scalars. Sharded tensors are DTensors. They share
        the actor's memory: copy what outlives the next update.
        """
        return sharded_state(self.model, self._parked.rows(), self.optimizer, self.ranks, self.num_updates)

    def blank_state(self, moments: bool) -> dict[str, Tensor]:
        """Memory on the host for a sharded state, with or without ``moments``, to be read from a checkpoint."""
        return blank_state(self.model, self.optimizer, self.ranks, moments)

    def load_sharded_state(self, state: dict[str, Tensor]) -> None:
        """Puts back what ``sharded_state`` gave, here or on another number of ranks. All ranks call it together.

        Raises ValueError naming what does not match the model or is no number (PeerStopped on other ranks); nothing
        has changed then.
        """
        with self._parked.resident():
            self.num_updates = install_state(self.model, self.optimizer, self.ranks, state)

    def _update(
        self,
        sequences: Sequence[TrainSequence],
        audit: Audit | None,
        ledger: Ledger,
        redraw: Redraw | None,
        every_token: bool,
    ) -> dict[str, float]:
        lr = self.config.optim.lr_at(self.num_updates)
        self.optimizer.set_lr(lr)
        steps, longest, audit_seconds, beyond = [], 0, 0.0, Scored([], [])
        if audit is not None and every_token:
            started, first = perf_counter(), set(mini_batches(self.config, self.num_updates, len(sequences), 0)[0])
            beyond = self._score(sequences, [i for i in range(len(sequences)) if i not in first], redraw)
            audit_seconds = perf_counter() - started
        self.problems = []
        correction = SampleCorrection.of(self.config, sequences, self.logprobs)
        for epoch in range(self.config.ppo_epochs):
            batches = mini_batches(self.config, self.num_updates, len(sequences), epoch)
            ledger.require_each_once(range(len(sequences)), [i for indices in batches for i in indices])
            for indices in batches:
                scales = None if correction is None else correction.scales(indices)
                steps.append(self._step(sequences, indices, scales, ledger, audit, beyond, redraw))
                longest = max(longest, self.skipped_in_a_row)
                audit = redraw = None
        self.num_updates += 1
        health = {"actor/skipped_in_a_row": float(longest), "actor/nonfinite_tensors": self._num_nonfinite()}
        means = mean_metrics(steps)
        idle = means.pop("actor/idle_share")
        means |= {"perf/idle_share/actor": idle} if self.ranks.at_once > 1 else {}
        means |= health | {"timing_s/audit_forward": audit_seconds}
        means |= {} if correction is None else correction.metrics()
        return means | {"actor/lr": lr} | self._coefficients()

    def _score(self, sequences: Sequence[TrainSequence], indices: list[int], redraw: Redraw | None = None) -> Scored:
        """This rank's share of some of the sequences, by forwards without gradients. All ranks call it together."""
        names = [sequences[i].sample.request_id for i in indices]
        tokens = [token_sequence(sequences[i]) for i in indices]

        def watch(batch: PackedBatch, group: list[int]) -> PackedBatch:
            return batch if redraw is None else redraw.watch(batch, [indices[i] for i in group])

        budget = self.config.max_micro_batch_tokens
        scored = score(self.model, tokens, names, budget, self.ranks, watch)
        return scored.under(indices)

    def _num_nonfinite(self) -> float:
        found = nonfinite_state(self.model, self.optimizer)
        self.problems += found
        return self.ranks.gather(torch.tensor(float(len(found)), device=self.ranks.device)).max().item()

    def _step(
        self,
        sequences: Sequence[TrainSequence],
        indices: list[int],
        scales: Sequence[LossScales] | None,
        ledger: Ledger,
        audit: Audit | None,
        beyond: Scored,
        redraw: Redraw | None,
    ) -> dict[str, float]:
        """One optimizer step on one mini-batch; the audit sees it together with what was scored ``beyond`` it."""
        chosen = [sequences[i] for i in indices]
        tokens = [token_sequence(s) for s in chosen]
        num_tokens = sum(len(s.response) for s in tokens)
        denominators = Denominators(num_tokens, len(tokens), self.config.loss_scale_factor)
        names = [s.sample.request_id for s in chosen]
        lengths, balance = [s.num_input_tokens for s in tokens], self.config.balance_micro_batches
        budget, key = self.config.max_micro_batch_tokens, self.ranks.budget_key
        groups = pack(lengths, budget, balance=balance, names=names, key=key)
        own = self.ranks.share(groups)
        metrics = MiniBatchMetrics()
        self.gradients.start(len(groups) * self.ranks.per_batch)
        watch = self._watch_experts(len(chosen))
        values, routes, read = [], [], []
        for group in own:
            batch = group_batch(tokens, group, self.ranks)
            if redraw is not None:
                batch = redraw.watch(batch, [indices[i] for i in group])
            self.gradients.next_round()
            logprobs, digest, checksum = self._accumulate(chosen, scales, batch, group, denominators, metrics, watch)
            values.append(logprobs)
            routes.append(digest)
            read += checksum
        with self.ranks.together():
            ledger.require_each_once(indices, [indices[i] for group in groups for i in group])
            if read:
                ledger.compare([indices[i] for group in own for i in group], torch.cat(read, dim=1).cpu())
            if audit is not None:
                scored = by_sequence(values, routes, tokens, self.ranks.reported(own)).under(indices)
                every = None if scored.routes is None else scored.routes + (beyond.routes or [])
                audit(scored.indices + beyond.indices, scored.logprobs + beyond.logprobs, every)
        shares = self.ranks.by_micro_batch(metrics.rows, len(groups)).T.tolist()
        sums = {name: sum(values) for name, values in zip(metrics.names, shares, strict=True)}
        norm = self.optimizer.step(self.config.grad_clip) if math.isfinite(sums["loss"]) else math.nan
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
            self.problems.append(why_skipped(sums["loss"], self.model))
        if watch is not None:
            loads = watch.total()
            sums |= load_metrics(loads)
            if math.isfinite(norm) and self.config.router_bias_update_rate:
                update_router_bias(self.model, loads, self.config.router_bias_update_rate, self.ranks)
        return sums | {"grad_norm": norm, "idle_share": idle_share(groups, lengths, self.ranks.at_once)}

    def _watch_experts(self, num_sequences: int) -> ExpertWatch | None:
        if not self.model.chooses_experts:
            return None
        return ExpertWatch(self.model.config, self.aux_coefficient, num_sequences, self.ranks)

    def _accumulate(
        self,
        chosen: Sequence[TrainSequence],
        scales: Sequence[LossScales] | None,
        batch: PackedBatch,
        group: list[int],
        denominators: Denominators,
        metrics: MiniBatchMetrics,
        watch: ExpertWatch | None,
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Forward and backward of one micro-batch; returns its log-probabilities (R,), what experts its rows chose, and
        what a ledger compares."""
        interrupt.check()
        read = []
        if group:
            targets = policy_targets([chosen[i] for i in group], self.config.use_kl_loss, self.ranks.device)
            if scales is not None:
                targets = replace(targets, scales=packed_scales([scales[i] for i in group], self.ranks.device))
            read.append(checksums(batch.targets.token_ids, targets, batch.response_lengths))
        else:
            zeros = torch.zeros_like(batch.targets.min_logit)
            targets = PolicyTargets(zeros, zeros, zeros)
        if self.one_pass:
            batch = one_pass.with_derivative(batch, targets, self.config, denominators)
        routing = watch.begin(batch) if watch is not None and group else None
        scores, digest = routed_scores(self.model, batch, routing)
        loss, shares = micro_batch_loss(scores, batch, targets, self.config, denominators)
        if isinstance(scores, TrainedCrossEntropy):
            scores.surrogate.backward()
        else:
            loss.backward()
        if watch is not None:
            added = watch.end(batch)
            shares |= added | {"loss": shares["loss"] + watch.loss_of(added)}
        metrics.add(shares)
        return scores.logprobs.detach(), digest, read

    def _coefficients(self) -> dict[str, float]:
        return {"actor/kl_coef": self.config.kl_loss_coef} if self.config.use_kl_loss else {}
