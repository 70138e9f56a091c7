"""One step off (``trainer.async_steps=1``): samples of the next step while this one trains, and what they are worth."""

from vexact.trainer.ahead.ahead import Ahead, StaleSamplesError, staleness_metrics
from vexact.trainer.ahead.past_audit import PastAudit
from vexact.trainer.ahead.stored import read_collected, write_collected

__all__ = ["Ahead", "PastAudit", "StaleSamplesError", "read_collected", "staleness_metrics", "write_collected"]
