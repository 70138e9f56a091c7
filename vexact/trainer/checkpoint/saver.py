"""When a checkpoint is staged, written and published: at once, or beside the steps that follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, Protocol

from vexact import interrupt
from vexact.models.config import ModelConfig
from vexact.trainer.checkpoint.error import CheckpointError
from vexact.trainer.checkpoint.progress import Progress
from vexact.trainer.checkpoint.shard_files import FOLDER, Written
from vexact.trainer.checkpoint.shard_writer import AbandonedError
from vexact.trainer.checkpoint.store import CheckpointStore

log = logging.getLogger(__name__)


class ShardGroup(Protocol):
    """All ranks' ``ShardWriter``s as one; in one process the writer itself."""

    def save(self, step: int, directory: Path, background: bool) -> list[Written] | None: ...
    def poll(self) -> list[Written] | None: ...
    def wait(self) -> list[Written]: ...
    def abandon(self) -> None: ...


@dataclass(slots=True)
class _Flight:
    """A checkpoint on its way: ``publishing`` once all ranks have written."""

    progress: Progress
    temporary: Path
    publish: Callable[[list[Written]], Path]
    publishing: Future[Path] | None = None


class Saver:
    """At most one checkpoint is on its way. A context manager, around the steps: what is on its way at the end is
    finished, also after an error; an interrupt abandons it, and the checkpoint before it counts.

    Raises:
        CheckpointError: a checkpoint could not be written. Earlier ones are untouched, and nothing half-written stays.
    """

    def __init__(
        self,
        store: CheckpointStore,
        shards: ShardGroup,
        in_background: bool = False,
        on_saved: Callable[[Path, int], None] = lambda path, step: None,
    ) -> None:
        """``on_saved(path, step)`` is called in the caller's thread once a checkpoint has its name."""
        self.store, self.shards, self.in_background, self.on_saved = store, shards, in_background, on_saved
        self._flight: _Flight | None = None
        self._stop = Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="publish")

    def save(
        self,
        progress: Progress,
        model: ModelConfig,
        save_beside: Callable[[Path], Any],
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves what the state is now; in the background it returns when that is copied to the host."""
        self.finish()
        self._stop.clear()
        temporary = self.store.begin(progress, save_beside, identity)
        publish = partial(self.store.publish, temporary, progress, model, go_on=self._go_on)
        self._flight = flight = _Flight(progress, temporary, publish)
        with self._abandoning():
            written = self.shards.save(progress.step, temporary / FOLDER, self.in_background)
            if written is not None:
                self._land(publish(written), flight)

    def advance(self) -> None:
        """Publishes what all ranks have written, in a thread. Never waits, and leaves a failure for ``poll``."""
        flight = self._flight
        if flight is not None and flight.publishing is None:
            try:
                written = self.shards.poll()
            except CheckpointError as error:
                flight.publishing = Future()
                flight.publishing.set_exception(error)
            else:
                if written is not None:
                    flight.publishing = self._pool.submit(flight.publish, written)

    def poll(self) -> None:
        """At a step's boundary: says what became of the checkpoint on its way, if that is known by now."""
        self.advance()
        flight = self._flight
        if flight is not None and flight.publishing is not None and flight.publishing.done():
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint on its way."""
        flight = self._flight
        if flight is None:
            return
        with self._abandoning():
            if flight.publishing is None:
                written = self.shards.wait()
                flight.publishing = self._pool.submit(flight.publish, written)
            self._land(flight.publishing.result(), flight)

    def abandon(self) -> None:
        """Gives up the checkpoint on its way, unless it has just got its name."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        self._stop.set()
        self.shards.abandon()
        if flight.publishing is not None:
            with suppress(Exception, KeyboardInterrupt):
                self._land(flight.publishing.result(), flight)
        self.store.discard(flight.temporary)

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish()
            elif isinstance(error, Exception):
                self._finish_after(error)
        finally:
            self.abandon()
            self._pool.shutdown()

    def _finish_after(self, error: Exception) -> None:
        """The step that was saved is sound whatever failed later; a failure to save it must not hide that error."""
        try:
            self.finish()
        except Exception as another:
            if another is error:  # a rank that is gone has taken it along
                log.warning("the checkpoint on its way is lost with it")
                return
            log.warning("after %s the checkpoint on its way was lost, too: %s", type(error).__name__, another)

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Nothing half-written stays, whatever ends the block."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

    def _land(self, path: Path, flight: _Flight) -> None:
        self._flight = None
        self.on_saved(path, flight.progress.step)

    def _go_on(self) -> None:
        interrupt.check()
        if self._stop.is_set():
            raise AbandonedError("the save was abandoned")
