"""Ctrl-C, SIGTERM and a terminal that closes: none is lost, wherever it lands, and the exit code is 130.

Python runs a signal's handler in the main thread, between two bytecodes. What the handler raises is dropped inside a
finalizer, a callback of a weak reference, of C code or of importlib; and while C code computes there is no bytecode.
Hence three layers:

* The handler sets a flag, which every loop looks at (``check``), and raises KeyboardInterrupt, once.
* Outside ``unwinding()`` there is nothing to close, so nothing is raised: the process ends there and then. Importing in
  particular turns an interrupt into other errors.
* A thread hears of the signal through a descriptor, C code or not. It ends the process at a second signal, or when
  ``GRACE_S``, or what ``unwinding`` was given, have gone by. That loses nothing that SIGKILL would not lose, and a run
  survives SIGKILL.

A program that uses the engine as a library keeps its own signals: the flag is then never set.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

EXIT_CODE = 130
GRACE_S = 10.0  # to close what is open
REPEAT_S = 1.0  # what follows sooner belongs to the same wish: `timeout` and service managers send a signal twice
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_requested = False
_unwinding = False
_owns_process = False
_grace_s = GRACE_S
_note = ""
_cause = ""
_is_said = False
_is_withdrawn = False
_ending = threading.Lock()


def check() -> None:
    """Raises KeyboardInterrupt once a signal has come. For every loop that takes more than a moment."""
    if _requested:
        raise KeyboardInterrupt


def requested() -> bool:
    """Whether a signal has come."""
    return _requested


def note(text: str) -> None:
    """What the user should read if a signal ends the process from here on: what is saved, and how to go on."""
    global _note
    _note = text


def noted() -> str:
    """What ``note`` was given last."""
    return _note


def cause(text: str) -> None:
    """What the user should read first if a signal ends the process before an error has said it."""
    global _cause
    _cause = text


def withdraw() -> None:
    """The signal was a launcher's, for something that is known by now: the error that tells it ends the process."""
    global _requested, _is_withdrawn
    _requested, _is_withdrawn = False, True


def message() -> str:
    """The line to leave behind; empty from the second call on."""
    global _is_said
    first, _is_said = not _is_said, True
    return "\n" + "; ".join(filter(None, ("interrupted", _cause, _note))) + "\n" if first else ""


@contextmanager
def unwinding(grace_s: float = GRACE_S) -> Iterator[None]:
    """Around whatever has to be closed: inside, a signal raises KeyboardInterrupt, so that ``finally`` blocks run.

    ``grace_s``: seconds they get before the process is ended, if more than ``GRACE_S``.
    """
    global _unwinding, _grace_s
    before = _unwinding, _grace_s
    _unwinding, _grace_s = True, max(_grace_s, grace_s)
    try:
        yield
    finally:
        _unwinding, _grace_s = before


def install() -> None:
    """Takes the signals over until the process ends; for one that is this command and nothing else. Idempotent.

    A signal that the process was told to ignore (``nohup``, a background job) stays ignored.
    """
    global _owns_process
    if _owns_process or threading.current_thread() is not threading.main_thread():
        return
    _owns_process = True
    taken = _take_over()
    atexit.register(_ignore, taken)  # the first that is registered runs last: C code ends the process undisturbed
    _leave_forked_children_alone(taken)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(ours,), daemon=True).start()


@contextmanager
def borrowed() -> Iterator[None]:
    """Takes the signals over for one call out of a program that lives on: they raise, and are given back at the end.

    Nothing changes inside another such call, nor in a process that has installed them.
    """
    if _owns_process or _unwinding or threading.current_thread() is not threading.main_thread():
        yield
        return
    _forget()
    hook = sys.unraisablehook
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    _take_over()
    try:
        with unwinding():
            yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)
        sys.unraisablehook = hook
        _forget()


def _forget() -> None:
    global _requested, _note, _cause, _is_said, _is_withdrawn
    _requested = _is_said = _is_withdrawn = False
    _note = _cause = ""


def _take_over() -> list[int]:
    """Installs the handlers; returns the signals they are for."""
    taken: list[int] = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in taken:
        signal.signal(number, _handle)
    hook = sys.unraisablehook

    def report(lost: sys.UnraisableHookArgs) -> None:
        if not (_requested and lost.exc_type is KeyboardInterrupt):  # the flag has it: no traceback on the console
            hook(lost)

    sys.unraisablehook = report
    return taken


def _handle(_signal: int, _frame: FrameType | None) -> None:
    global _requested
    first, _requested = not _requested, True
    if first and not _unwinding:
        _end()
    if first or not _owns_process:
        raise KeyboardInterrupt


def _watch(descriptor: int) -> None:
    first = 0.0
    while True:
        patience = max(0.0, first + _grace_s - time.monotonic()) if first and not _is_withdrawn else None
        if not select.select([descriptor], [], [], patience)[0]:
            if _is_withdrawn:
                continue
            _end()
        if os.read(descriptor, 1)[0] not in SIGNALS:
            continue
        now = time.monotonic()
        if first and now > first + REPEAT_S:
            _end()
        if not (_unwinding or _requested):  # the handler waits for C code to come back, and nothing is open
            _end()
        first = first or now


def _end() -> NoReturn:
    """Ends the process as it stands; the thread that comes first has the word."""
    while not _ending.acquire(blocking=False):
        time.sleep(GRACE_S)
    with suppress(OSError):
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress bar hides the cursor
        if select.select([], [2], [], 0.0)[1]:  # a full pipe that nobody reads must not hold us up
            os.write(2, message().encode())
    os._exit(EXIT_CODE)


def _ignore(taken: list[int]) -> None:
    for number in taken:
        signal.signal(number, signal.SIG_IGN)


def _leave_forked_children_alone(taken: list[int]) -> None:
    """A signal to a forked child is not one to us, and ends the child without a word."""
    before = threading.local()

    def block() -> None:
        before.mask = signal.pthread_sigmask(signal.SIG_BLOCK, taken)

    def restore() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before.mask)

    def release() -> None:
        global _owns_process, _requested
        _owns_process = _requested = False
        signal.set_wakeup_fd(-1)
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        restore()

    os.register_at_fork(before=block, after_in_parent=restore, after_in_child=release)
