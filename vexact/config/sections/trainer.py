"""`trainer.*`: the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vexact.config.fields import LARGEST_64, opt

Sink = Literal["console", "jsonl", "wandb", "tensorboard"]


@dataclass(frozen=True)
class TrainerSection:
    project_name: str = opt("vexact", "First part of the run's name.", verl="verl_examples")
    experiment_name: str = opt("default", "Second part of the run's name.", verl="gsm8k")
    default_local_dir: str | None = opt(
        None, "Run directory; null is runs/<project>/<experiment>.", verl="checkpoints/<project>/<experiment>"
    )
    seed: int = opt(42, "The one seed: data order, sampling and initialisation.", ge=0, le=LARGEST_64)
    device: Literal["auto", "cpu", "cuda"] = opt("auto", "auto takes the GPU if there is one.", verl="cuda")
    exactness: Literal["strict", "warn", "off"] = opt(
        "strict", "On a log-probability or a draw that differs: stop, log and go on, or do not look."
    )
    audit_redraw_ratio: float = opt(
        0.0625, "Share of the audited tokens that are drawn again, from the trainer's logits; 0 for none.", ge=0, le=1
    )
    audit_every_token_freq: int = opt(
        20,
        "Every so many steps, log-probabilities outside the first mini-batch are compared as well, by a forward before "
        "the first update (timing_s/audit_forward); -1 for never.",
        ge=-1,
    )
    max_skipped_updates: int = opt(
        2,
        "Optimizer steps in a row that may be skipped because loss or gradient is not finite; one more stops the run "
        "under exactness=strict. 0 stops at the first.",
        ge=0,
    )
    total_epochs: int = opt(
        30,
        "Passes over the training rows, one after another: a batch may hold the last rows of one and the first of the "
        "next, where verl leaves them out.",
        ge=1,
    )
    total_training_steps: int | None = opt(None, "Stop after so many steps, whatever total_epochs says.", ge=1)
    logger: tuple[Sink, ...] = opt(
        ("console", "jsonl"), "Where metrics go.", verl="[console,wandb]", aliases={"file": "jsonl"}
    )
    samples_per_step: int = opt(16, "Samples written to samples/step_N.jsonl each step; -1 writes all, 0 none.", ge=-1)
    profile_steps: tuple[int, ...] | None = opt(
        None,
        "Steps whose generation and update torch.profiler traces into profile/ of the run directory "
        "(docs/troubleshooting.md); null for none.",
        ge=1,
    )
    profile_ranks: tuple[int, ...] = opt((0,), "Ranks that write traces of profile_steps.", ge=0)
    report: bool = opt(True, "Write report.html into the run directory when the run ends (docs/reports.md).")
    save_freq: int = opt(-1, "Checkpoint every so many steps; -1 only at the end.", ge=-1)
    keep_last: int | None = opt(2, "Checkpoints to keep; null keeps all.", ge=1)
    best_metric: str | None = opt(
        None,
        "Metric, by its name in metrics.jsonl, whose best checkpoint is kept beyond keep_last and named by the file "
        "best; null keeps none. One of a validation (val-…) ranks the checkpoints whose step was validated.",
    )
    best_metric_mode: Literal["max", "min"] = opt("max", "Whether its largest or its smallest value is the best.")
    test_freq: int = opt(-1, "Validate every so many steps; -1 only at the end.", ge=-1)
    val_before_train: bool = opt(True, "Validate before the first step.")
    val_only: bool = opt(False, "Validate and stop.")
    resume_mode: Literal["auto", "disable", "resume_path"] = opt(
        "auto", "Go on from the run directory's latest checkpoint, start anew, or go on from resume_from_path."
    )
    resume_from_path: str | None = opt(None, "Checkpoint directory for resume_mode=resume_path.")
    resume_changed: Literal["refuse", "allow"] = opt(
        "refuse",
        "On a resume whose settings, data, model, tokenizer or reward changed, so that its steps would not be those of "
        "an uninterrupted run: name the changes and stop, or go on.",
    )
    nnodes: int = opt(1, "Machines.", ge=1)
    n_gpus_per_node: int | None = opt(
        None, "Processes per machine, one per GPU; null for every visible GPU, and for one on a CPU.", verl=8, ge=1
    )
    ray_address: str | None = opt(
        None,
        "host:port of the Ray cluster to join, auto for the one of this machine, local for a new one; null joins that "
        "of RAY_ADDRESS, which a job of `ray job submit` has, and starts a new one without.",
    )
    worker_timeout_s: float = opt(
        3600.0,
        "Seconds after which one stage of a step (generation, update, …) on several processes counts as hung.",
        gt=0,
        le=604_800,
    )
    rollout_gpus: int | None = opt(
        None,
        "GPUs, of all nodes together, that generate while the others train; null has every GPU do both in turn.",
        ge=1,
    )
    async_steps: int = opt(
        0,
        "Training steps that generation may run ahead, with weights as much older: 1 generates the next step's samples "
        "while this one trains. Needs rollout_gpus.",
        ge=0,
        le=1,
    )
    async_audit_freq: int = opt(
        10,
        "With async_steps, every so many steps, the first included, samples are compared under the weights that "
        "generated them, of which each rank keeps a copy in host memory; -1 for never.",
        ge=-1,
    )

    @property
    def training_gpus(self) -> int | None:
        """GPUs that train; None when their number is that of the machine."""
        if self.n_gpus_per_node is None:
            return None
        return self.nnodes * self.n_gpus_per_node - (self.rollout_gpus or 0)
