"""Where numbers go: console, JSON lines, Weights & Biases, TensorBoard, and sample dumps."""

from vexact.report.reporter import Reporter
from vexact.report.samples.files import write_samples
from vexact.report.timers import Timers

__all__ = ["Reporter", "Timers", "write_samples"]
