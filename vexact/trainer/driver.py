"""The training loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vexact import interrupt
from vexact.audit import Audit, DrawError, ExactnessError
from vexact.audit.certificate import CertificateError, require_certificate
from vexact.config import Config
from vexact.models import ModelConfig
from vexact.report import Reporter, Timers
from vexact.report.metrics import advantage_metrics, length_metrics, perf_metrics, score_metrics
from vexact.trainer.ahead import Ahead, PastAudit, staleness_metrics
from vexact.trainer.checkpoint import CheckpointStore, Progress, Saver
from vexact.trainer.run.pending_step import PendingStep
from vexact.trainer.step.advantages import train_sequences
from vexact.trainer.step.collect import Collected, Collector
from vexact.trainer.step.diagnose import diagnose
from vexact.trainer.step.evaluate import evaluate
from vexact.trainer.step.memory_health import MemoryHealth
from vexact.trainer.step.mfu import UpdateUtilisation
from vexact.trainer.step.old_log_probs import recompute_old_log_probs
from vexact.trainer.step.samples import keep_samples
from vexact.trainer.step.update_health import UpdateError, UpdateHealth
from vexact.trainer.workers import Workers
from vexact.training import Ledger
from vexact.types import SampleGroup, StepStats, TrainSequence

log = logging.getLogger(__name__)


class Driver:
    """Runs the steps; owns the step number and the data cursor and nothing else."""

    def __init__(
        self,
        config: Config,
        workers: Workers,
        reporter: Reporter,
        store: CheckpointStore,
        audit: Audit,
        total_steps: int,
        progress: Progress,
        identity: Mapping[str, Any],
        ready: Collected | None = None,
    ) -> None:
        """
        Args:
            identity: what the run is; every checkpoint holds it.
            ready: the groups of the step after ``progress``, if the run that it goes on with has generated them.
        """
        self.config, self.workers, self.reporter, self.store = config, workers, reporter, store
        self.audit, self.total_steps, self.progress = audit, total_steps, progress
        self.identity, self.pending = identity, PendingStep(config.run_dir)
        self.health = UpdateHealth(config.trainer.exactness, config.trainer.max_skipped_updates)
        self.memory_health = MemoryHealth(config, progress.step + 1)
        self.saver = Saver(store, workers.shards, config.actor.checkpoint.async_save, self._saved)
        self.utilisation = UpdateUtilisation(config, workers)
        self.stage = "gen"  # that began last
        self.timers = Timers(on_enter=self._begin)
        self.collector, first = Collector(config, workers, self.timers), progress.step + 1
        stored = None if ready is None else (first, ready)
        self.ahead = Ahead(self.collector, config.trainer.async_steps, total_steps, stored)
        self.past = PastAudit(config, workers, audit, self.timers, first if ready is None else first + 1)

    def run(self) -> None:
        """All steps from where the run stands to ``total_steps``, with validation and checkpoints when due."""
        self._sync(self.progress.step)
        trainer = self.config.trainer
        due = trainer.val_only or (trainer.val_before_train and self.progress.step == 0)
        if due and self.workers.val_data is not None:
            self._report_validation(self.progress.step)
        if trainer.val_only:
            return
        self._report_pending()
        if self.progress.step >= self.total_steps:
            return
        self._self_test()
        self.workers.freeze_heap()
        first, rewards = self.progress.step + 1, []
        with self.saver:
            for step in range(first, self.total_steps + 1):
                self.saver.poll()
                rewards.append(self._step(step))
        interrupt.note(f"all {self.total_steps} steps are done and saved in {self.config.run_dir}")
        log.info("%s", self._summary(first, rewards))

    def _begin(self, stage: str) -> None:
        self.stage = stage
        interrupt.check()
        self.saver.advance()
        self.reporter.stage(stage)

    def _self_test(self) -> None:
        config, workers = self.config, self.workers
        try:
            require_certificate(
                workers.engine,
                workers.actor,
                config.run_dir,
                config.trainer.exactness if config.rollout.is_own else "off",  # no other engine could pass
                rollout_attention=config.rollout.attn_impl,
                trainer_attention=config.actor.attn_implementation,
                environment=dict(self.identity["environment"]),
                while_scoring=lambda: workers.at_rest(self.progress.step),
            )
        except CertificateError as error:
            if error.comparison.first_request is not None:
                sample, sampling = error.self_test.first_different()
                diagnose(error, sample, sampling, workers, config.run_dir, config.model.path)
            raise

    def _summary(self, first: int, rewards: list[float]) -> str:
        compared, done = self.audit.num_checks, self.total_steps - first + 1
        scope = f" in {compared} of {done} steps" if 0 < compared < done else ""
        steps, reward = f"step {first}", f"{rewards[0]:.3f}"
        if done > 1:
            steps, reward = f"steps {first} to {self.total_steps}", f"{reward} to {rewards[-1]:.3f}"
        return f"done: {steps}, reward {reward}, {self.audit.totals()}{scope}; everything is in {self.config.run_dir}"

    def _step(self, step: int) -> float:
        """One step; returns its mean score."""
        workers = self.workers
        epoch = workers.order.epoch(self.progress.data_cursor)
        with self.timers("step"):
            # 1-4: prompts, samples at weights version step-1 (one step off: step-2), scores, groups worth training on
            groups, sampled, cursor, rollout_metrics = self.ahead.take(step, self.progress.data_cursor)
            if self.ahead.depth:
                rollout_metrics |= staleness_metrics(step - 1, groups)
            self.ahead.begin(step + 1, cursor)
            workers.release_memory()
            # 5-6: old log-probabilities if asked for, reference log-probabilities if a KL term is on, advantages
            old = recompute_old_log_probs(self.config, groups, workers.actor, self.timers)
            with self.timers("adv"):
                sequences, ledger, reward_metrics = train_sequences(self.config, groups, workers.reference, old)
            # 7: pack, forward, audit the bits, loss, backward, optimizer step
            samples = [sequence.sample for sequence in sequences]
            self.audit.begin(samples, [self.collector.draw_settings(sample.request_id) for sample in samples])
            with self.timers("update_actor"), workers.profiler("update", samples[0].request_id):
                actor_metrics = self._update(step, sampled, sequences, ledger)
            self.ahead.finish()
            # 8: the rollout gets version step, checksummed
            with self.timers("update_weights"):
                sync_metrics = self._sync(step)
            self.memory_health.check(step, sync_metrics)
            self.progress = Progress(step, cursor)
            # 9: the checkpoint, then validation, when due: whatever validation does, the trained weights are on disk
            validate = self._is_validation_due(step)
            different = self.audit.different_tokens()
            keep_samples(self.config, workers, self.reporter, step, sampled, different=different, table=validate)
            data = self.config.data
            metrics = {
                "training/global_step": float(step),
                "training/epoch": float(epoch),
                **score_metrics(sampled),
                **reward_metrics,
                **advantage_metrics(sequences),
                **length_metrics(samples, data.max_prompt_length, data.max_response_length),
                **actor_metrics,
                **self.audit.metrics(),
                **rollout_metrics,
                **sync_metrics,
            }
            save = self._is_save_due(step)
            if save and validate:
                self.pending.write(step, metrics)
                self._save()
            if validate:
                metrics |= self._timed_validation(step)
        # 10: report; a checkpoint without validation comes after, so that a killed run repeats a row and lacks none
        timing = self.timers.take()
        num_tokens = sum(sample.num_tokens for sample in samples)
        metrics |= perf_metrics(num_tokens, timing["timing_s/step"], workers.num_processes)
        metrics |= self.utilisation.metrics(sequences, timing["timing_s/update_actor"]) | timing
        self.reporter.log(StepStats(step, metrics))
        self.pending.clear()
        if save and not validate:
            self._save()
        self.store.note_metrics(step, metrics, validated=validate)
        return metrics["critic/score/mean"]

    def _sync(self, version: int) -> dict[str, float]:
        metrics = self.workers.sync_weights(version, keep=self.past.needs(version))
        self.workers.resume_cache()
        return metrics

    def _update(
        self, step: int, sampled: Sequence[SampleGroup], sequences: Sequence[TrainSequence], ledger: Ledger
    ) -> dict[str, float]:
        actor, metrics = self.workers.actor, {"training/global_step": float(step)}
        every = self.config.trainer.audit_every_token_freq
        every_token = every > 0 and step % every == 0
        try:
            if sequences[0].sample.weights_version < step - 1:
                self.past.compare(step, sequences)
                metrics |= actor.update(sequences, ledger=ledger)
            else:
                metrics |= actor.update(
                    sequences, self.audit.check, ledger=ledger, redraw=self.audit.redraw, every_token=every_token
                )
                audited = len(sequences) if every_token else min(len(sequences), actor.config.ppo_mini_batch_size)
                self.audit.require_compared(audited)
            self.health.check(metrics, actor.problems)
        except (ExactnessError, DrawError, UpdateError) as error:
            keep_samples(
                self.config, self.workers, self.reporter, step, sampled, different=self.audit.different_tokens()
            )
            self.reporter.log(StepStats(step, metrics | self.audit.metrics()))
            name = error.comparison.first_request if isinstance(error, ExactnessError) else None
            if isinstance(error, ExactnessError) and name is not None:
                config = self.config
                sample = next(s.sample for s in sequences if s.sample.request_id == name)
                diagnose(error, sample, self.collector.sampling, self.workers, config.run_dir, config.model.path)
            raise
        return metrics

    def _report_pending(self) -> None:
        """Ends a step whose checkpoint was saved by a run that ended before it could report it."""
        step = self.progress.step
        metrics = self.pending.metrics(step)
        if metrics is not None:
            if self._is_validation_due(step):
                log.info("step %d is trained and saved; its validation is repeated", step)
                metrics |= self._timed_validation(step)
            self.reporter.log(StepStats(step, metrics | self.timers.take()))
        self.pending.clear()
        if metrics is not None:
            self.store.note_metrics(step, metrics, validated=self._is_validation_due(step))

    def _is_validation_due(self, step: int) -> bool:
        return self.workers.val_data is not None and self._is_due(step, self.config.trainer.test_freq)

    def _is_save_due(self, step: int) -> bool:
        return self._is_due(step, self.config.trainer.save_freq)

    def _is_due(self, step: int, every: int) -> bool:
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _timed_validation(self, step: int) -> dict[str, float]:
        with self.timers("testing"):
            return self._validate(step)

    def _validate(self, step: int) -> dict[str, float]:
        metrics, groups = evaluate(self.config, self.workers)
        keep_samples(self.config, self.workers, self.reporter, step, groups, stem="val")
        return metrics

    def _report_validation(self, step: int) -> None:
        self.reporter.begin(step)
        metrics = self._timed_validation(step)
        if metrics:
            self.reporter.log(StepStats(step, metrics | self.timers.take()))

    def _save(self) -> None:
        with self.timers("save_checkpoint"):
            model = ModelConfig.from_hf_dir(self.config.model.path)
            self.saver.save(self.progress, model, self._save_beside, self.identity)

    def _save_beside(self, directory: Path) -> None:
        self.workers.tokenizer.save_pretrained(directory)
        self.ahead.save(directory)

    def _saved(self, path: Path, step: int) -> None:
        log.info("saved %s", path)
        interrupt.note(how_to_go_on(self.config, step))


def how_to_go_on(config: Config, saved_step: int) -> str:
    """What an interrupted run tells its user; step 0 stands for a run without a checkpoint."""
    if not saved_step:
        return "no step is saved yet: the same command starts anew"
    how = "the same command goes on" if config.trainer.resume_mode == "auto" else "trainer.resume_mode=auto goes on"
    return f"step {saved_step} is saved in {config.run_dir}: {how} from there"
