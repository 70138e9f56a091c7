"""One HTML file that shows a run, or several side by side, and opens without a network."""

from vexact.report.html.page import FILE_NAME, MissingPlotlyError, write_report
from vexact.report.html.record import NoRunError, RunRecord, read_run

__all__ = ["FILE_NAME", "MissingPlotlyError", "NoRunError", "RunRecord", "read_run", "write_report"]
