"""`torch.profiler` traces of the stages of chosen steps, written where the stage runs."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from vexact.config import Config
from vexact.config.fields import ConfigError

log = logging.getLogger(__name__)
FOLDER = "profile"
_STEP = re.compile(r"step(\d+)-")  # how a step's requests are named


class StageProfiler:
    """Writes ``profile/step_N_STAGE_rankR.json.gz`` into the run directory, a trace that Perfetto and chrome://tracing
    open. A further stage of that name in the same step has ``_2``, ``_3``, … at the end.

    Example::

        with profiler("update", sample.request_id):
            actor.update(...)
    """

    def __init__(self, run_dir: Path, steps: Collection[int] = (), rank: int = 0) -> None:
        self._folder, self._steps, self._rank = run_dir / FOLDER, frozenset(steps), rank
        self._written: Counter[tuple[int, str]] = Counter()

    @classmethod
    def of(cls, config: Config, rank: int) -> StageProfiler:
        """That of one process of a run; it profiles nothing if others are to."""
        trainer = config.trainer
        return cls(config.run_dir, (trainer.profile_steps or ()) if rank in trainer.profile_ranks else (), rank)

    @contextmanager
    def __call__(self, stage: str, request_id: str) -> Iterator[None]:
        """``request_id``: of a request of the step; one of a validation belongs to none. What raises leaves no file."""
        found = _STEP.match(request_id)
        if found is None or int(found[1]) not in self._steps:
            yield
            return
        import torch
        from torch.profiler import ProfilerActivity, profile

        step = int(found[1])
        on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as profiled:
            yield
            if on_gpu:
                torch.cuda.synchronize()  # what a stage launched belongs to it
        self._written[step, stage] += 1
        count = self._written[step, stage]
        name = f"step_{step}_{stage}_rank{self._rank}{'' if count == 1 else f'_{count}'}.json.gz"
        try:
            self._folder.mkdir(exist_ok=True)
            unfinished = self._folder / f".{name}"
            profiled.export_chrome_trace(str(unfinished))
            unfinished.rename(self._folder / name)
        except OSError as error:
            log.warning("the trace %s is lost: %s", self._folder / name, error.strerror or error)
        else:
            log.info("wrote %s", self._folder / name)


def check_profile(config: Config, total_steps: int | None, num_processes: int) -> None:
    """Raises ConfigError for a step or a rank that there will not be; ``total_steps`` None is not known."""
    steps, ranks = config.trainer.profile_steps or (), config.trainer.profile_ranks
    for key, values, first, last in (
        ("trainer.profile_steps", steps, 1, total_steps),
        ("trainer.profile_ranks", ranks, 0, num_processes - 1),
    ):
        wrong = [] if last is None else [value for value in values if not first <= value <= last]
        if wrong:
            what = "steps" if first else "ranks"
            run = f"{what} are {first} to {last}" if first != last else f"only {what[:-1]} is {first}"
            raise ConfigError(f"{key}={list(values)}: there is no {wrong[0]}; this run's {run}")
    if steps and not ranks:
        raise ConfigError(
            f"trainer.profile_steps={list(steps)} with trainer.profile_ranks=[] would write nothing; name a rank, such "
            "as 0, or leave both out"
        )
