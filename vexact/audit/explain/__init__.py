"""The first-divergence finder: for a request whose bits differ, where rollout and trainer part."""

from vexact.audit.explain.divergence import STAGES, Divergence, Side
from vexact.audit.explain.recorder import Recorder, recording
from vexact.audit.explain.replay import explain, replay

__all__ = ["STAGES", "Divergence", "Recorder", "Side", "explain", "recording", "replay"]
