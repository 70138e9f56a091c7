"""Lines up two recordings by operator and token."""

from __future__ import annotations

from dataclasses import dataclass

from vexact.audit.explain.recorder import Call, Recorder, Rows, Site


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first operator output with unequal bits, and the first token in it."""

    site: Site
    position: int
    rollout: Call
    trainer: Call
    num_different: int  # tokens, of those both sides computed
    num_compared: int


def first_mismatch(rollout: Recorder, trainer: Recorder) -> Mismatch | None:
    """Earliest in the order of the forward, then the lowest position.

    Everything before it is equal for every token, so the operator itself, its arguments or its state is to blame.
    """
    for site, rows in rollout.rows.items():
        if site in trainer.rows:
            found = _compare(site, rows, trainer.rows[site])
            if found is not None:
                return found
    return None


def only_on_one_side(rollout: Recorder, trainer: Recorder) -> list[str]:
    """Operator calls that the other side never makes."""
    return [str(site) for site in rollout.rows.keys() ^ trainer.rows.keys() if site.module != "sampler"]


def _compare(site: Site, rollout: Rows, trainer: Rows) -> Mismatch | None:
    common = sorted(rollout.prints.keys() & trainer.prints.keys())
    different = [p for p in common if rollout.prints[p] != trainer.prints[p]]
    if not different:
        return None
    first = different[0]
    return Mismatch(site, first, rollout.calls[first], trainer.calls[first], len(different), len(common))
