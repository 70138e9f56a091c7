"""What of a step's samples is kept: the files of the run directory, and tables for dashboards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from vexact.config import Config
from vexact.report import Reporter, write_samples
from vexact.report.samples.table import sample_rows
from vexact.trainer.workers import Workers
from vexact.types import SampleGroup


def keep_samples(
    config: Config,
    workers: Workers,
    reporter: Reporter,
    step: int,
    groups: Sequence[SampleGroup],
    stem: str = "step",
    different: Mapping[str, Sequence[int]] | None = None,
    table: bool = True,
) -> None:
    """Writes ``trainer.samples_per_step`` samples to a file, and with ``table`` shows a few in the dashboards. A file
    that cannot be written is said to be lost, once a run, and training goes on.

    Args:
        stem: "step", or "val" for a validation.
        different: positions whose bits differ, by request; None where nothing was compared.
    """
    decode = partial(workers.tokenizer.decode, skip_special_tokens=True)  # as the text of a sample is
    limit = config.trainer.samples_per_step
    try:
        write_samples(config.run_dir, step, groups, decode, limit=limit, stem=stem, different=different)
    except OSError as error:  # a full disk: the checkpoint finds out whether it is one for the run
        reporter.say_lost("samples", error)
    if table and limit:
        reporter.samples(step, stem, sample_rows(groups, decode, different))
