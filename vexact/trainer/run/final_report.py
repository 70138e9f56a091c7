"""The report that a run leaves. It may fail; the run may not fail of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vexact import interrupt
from vexact.config import Config
from vexact.report import Reporter
from vexact.report.html import FILE_NAME, MissingPlotlyError, read_run, write_report

log = logging.getLogger(__name__)


@contextmanager
def final_report(config: Config, reporter: Reporter) -> Iterator[None]:
    """Writes ``report.html`` when the block ends or fails, not when it is interrupted; dashboards get it, too."""
    try:
        yield
    except Exception:
        if not interrupt.requested():
            _write(config, reporter)
        raise
    _write(config, reporter)


def _write(config: Config, reporter: Reporter) -> None:
    if not config.trainer.report:
        return
    if "jsonl" not in config.trainer.logger:
        log.info("no report: trainer.logger does not name jsonl, which it is made from")
        return
    try:
        page = write_report([read_run(config.run_dir)], config.run_dir / FILE_NAME)
        reporter.page(page)
        log.info("report: %s", page)
    except MissingPlotlyError as error:
        log.info("no report: %s", error)
    except Exception as error:
        log.warning("no report: %s", " ".join(f"{type(error).__name__}: {error}".split()))
