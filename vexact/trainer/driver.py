"""The training loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from vexact import interrupt
from vexact.audit import Audit, ExactnessError
from vexact.audit.certificate import CertificateError, require_certificate
from vexact.config import Config
from vexact.report import Reporter, Timers, write_samples
from vexact.report.metrics import advantage_metrics, length_metrics, perf_metrics, score_metrics
from vexact.trainer.advantages import train_sequences
from vexact.trainer.checkpoint import CheckpointStore, Progress, load_checkpoint
from vexact.trainer.collect import Collector
from vexact.trainer.diagnose import diagnose
from vexact.trainer.evaluate import evaluate
from vexact.trainer.workers import Workers
from vexact.types import SampleGroup, StepStats, TrainSequence
from vexact.weights import sync_weights

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
    ) -> None:
        self.config, self.workers, self.reporter, self.store = config, workers, reporter, store
        self.audit, self.total_steps, self.progress = audit, total_steps, progress
        self.timers = Timers(on_enter=self._begin)
        self.collector = Collector(config, workers, self.timers)

    def run(self) -> None:
        """All steps from where the run stands to ``total_steps``, with validation and checkpoints when due."""
        sync_weights(self.workers.actor, self.workers.engine, self.progress.step)
        trainer = self.config.trainer
        due = trainer.val_only or (trainer.val_before_train and self.progress.step == 0)
        if due and self.workers.val_data is not None:
            self._report_validation(self.progress.step)
        if trainer.val_only:
            return
        self._self_test()
        first, rewards = self.progress.step + 1, []
        for step in range(first, self.total_steps + 1):
            rewards.append(self._step(step))
        interrupt.note(f"all {self.total_steps} steps are done and saved in {self.config.run_dir}")
        if rewards:
            log.info("%s", self._summary(first, rewards))

    def _begin(self, stage: str) -> None:
        interrupt.check()
        self.reporter.stage(stage)

    def _self_test(self) -> None:
        config, workers = self.config, self.workers
        try:
            require_certificate(
                workers.engine,
                workers.actor,
                config.run_dir,
                config.trainer.exactness,
                rollout_attention=config.rollout.attn_impl,
                trainer_attention=config.actor.attn_implementation,
            )
        except CertificateError as error:
            sample, sampling = error.self_test.first_different()
            diagnose(error, sample, sampling, workers, config.run_dir, config.model.path)
            raise

    def _summary(self, first: int, rewards: list[float]) -> str:
        compared, different = self.audit.total_compared, self.audit.total_different
        audit = f"{compared} log-probabilities compared, {different} different" if compared else "nothing compared"
        return (
            f"done: steps {first} to {self.total_steps}, reward {rewards[0]:.3f} to {rewards[-1]:.3f}, {audit}; "
            f"everything is in {self.config.run_dir}"
        )

    def _step(self, step: int) -> float:
        """One step; returns its mean score."""
        workers = self.workers
        with self.timers("step"):
            # 1-4: prompts, samples at weights version step-1, scores, groups worth training on
            groups, sampled, cursor = self.collector.collect(step, self.progress.data_cursor)
            rollout_metrics = workers.engine.stats() | workers.rewards.take_metrics()
            # 5-6: reference log-probabilities if a KL term is on, advantages
            with self.timers("adv"):
                sequences, reward_metrics = train_sequences(self.config, groups, workers.reference)
            # 7: pack, forward, audit the bits, loss, backward, optimizer step
            self.audit.begin([sequence.sample for sequence in sequences])
            with self.timers("update_actor"):
                actor_metrics = self._update(step, sequences)
            # 8: the rollout gets version step, checksummed
            with self.timers("update_weights"):
                sync_metrics = sync_weights(workers.actor, workers.engine, step)
            self.progress = Progress(step, cursor)
            # 9: validation when due
            validation = self._validate_if_due(step)
        # 10: report; then the checkpoint when due, so that a run killed in between repeats a row rather than lacks one
        timing = self.timers.take()
        self._write_samples(step, sampled)
        samples = [sequence.sample for sequence in sequences]
        data = self.config.data
        metrics = {
            "training/global_step": float(step),
            "training/epoch": float(workers.order.epoch(max(cursor - 1, 0))),
            **score_metrics(sampled),
            **reward_metrics,
            **advantage_metrics(sequences),
            **length_metrics(samples, data.max_prompt_length, data.max_response_length),
            **actor_metrics,
            **self.audit.metrics(),
            **rollout_metrics,
            **sync_metrics,
            **perf_metrics(sum(sample.num_tokens for sample in samples), timing["timing_s/step"]),
            **timing,
            **validation,
        }
        self.reporter.log(StepStats(step, metrics))
        self._save_if_due(step)
        return metrics["critic/score/mean"]

    def _update(self, step: int, sequences: Sequence[TrainSequence]) -> dict[str, float]:
        try:
            return self.workers.actor.update(sequences, self.audit.check)
        except ExactnessError as error:
            self.reporter.log(StepStats(step, {"training/global_step": float(step), **self.audit.metrics()}))
            config, first = self.config, error.comparison.first
            assert first is not None, "an ExactnessError has a first unequal token"
            sample = next(s.sample for s in sequences if s.sample.request_id == first.request_id)
            diagnose(error, sample, self.collector.sampling, self.workers, config.run_dir, config.model.path)
            raise

    def _validate_if_due(self, step: int) -> dict[str, float]:
        every = self.config.trainer.test_freq
        due = step == self.total_steps or (every > 0 and step % every == 0)
        if not due or self.workers.val_data is None:
            return {}
        with self.timers("testing"):
            return self._validate(step)

    def _validate(self, step: int) -> dict[str, float]:
        metrics, groups = evaluate(self.config, self.workers)
        self._write_samples(step, groups, stem="val")
        return metrics

    def _report_validation(self, step: int) -> None:
        with self.timers("testing"):
            metrics = self._validate(step)
        if metrics:
            self.reporter.log(StepStats(step, metrics | self.timers.take()))

    def _save_if_due(self, step: int) -> None:
        every = self.config.trainer.save_freq
        if not (step == self.total_steps or (every > 0 and step % every == 0)):
            return
        with self.timers("save_checkpoint"):
            actor = self.workers.actor
            path = self.store.save(
                self.progress, actor.state_dict(), actor.model.config, self.workers.tokenizer.save_pretrained
            )
        log.info("saved %s", path)
        interrupt.note(how_to_go_on(self.config, step))

    def _write_samples(self, step: int, groups: Sequence[SampleGroup], stem: str = "step") -> None:
        limit = self.config.trainer.samples_per_step
        write_samples(self.config.run_dir, step, groups, limit=limit, stem=stem)


def how_to_go_on(config: Config, saved_step: int) -> str:
    """What an interrupted run tells its user; step 0 stands for a run without a checkpoint."""
    if not saved_step:
        return "no step is saved yet: the same command starts anew"
    how = "the same command goes on" if config.trainer.resume_mode == "auto" else "trainer.resume_mode=auto goes on"
    return f"step {saved_step} is saved in {config.run_dir}: {how} from there"


def resume_point(config: Config, store: CheckpointStore, workers: Workers) -> Progress:
    """Restores the trainer as ``resume_mode`` says and returns where the run stands."""
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return Progress(0, 0)
    if trainer.resume_mode == "resume_path":
        path: Path | None = Path(str(trainer.resume_from_path)).expanduser()
    else:
        path = store.latest()
    if path is None:
        return Progress(0, 0)
    progress, state = load_checkpoint(path)
    workers.actor.load_state_dict(state)
    return progress
