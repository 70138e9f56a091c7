"""A gate in front of Python's own ``eval``: while a library grades, it evaluates formulas and lists, nothing else.

Graders hold answers to a grammar before a library sees them. The gate is the second lock, at the place of evaluation:
whatever path leads there, in whatever release of a library, code that names anything but known functions is refused,
as are new processes and unpickled objects. Importing modules stays free.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType, FrameType

from vexact.reward.graders.answer_text import FUNCTIONS

# What sympy's parser writes for numbers, symbols and operators; single letters are symbols. Only answers that a task
# itself gives hold an integral.
_NAMES = FUNCTIONS | {"Integer", "Float", "Rational", "Symbol", "Add", "Mul", "Pow", "Integral", "pi"}
# Modules that write functions for their own use and execute them, from a template and numbers, whatever is graded.
_GENERATORS = frozenset({"sympy.polys.monomials"})
_REFUSED_EVENTS = frozenset(
    (
        *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen"),
        *("pty.spawn", "pickle.find_class", "code.__new__", "function.__new__", "ctypes.dlopen", "ctypes.dlsym"),
        *("socket.connect", "socket.bind"),
    )
)
_IMPORT_SYSTEM = "<frozen importlib._bootstrap"
_state = threading.local()


class RefusedEvaluation(RuntimeError):
    """A library was about to execute text that is no formula."""


@contextmanager
def evaluation_gate() -> Iterator[None]:
    """Within it, in this thread, an evaluation of anything but a formula or a list raises RefusedEvaluation."""
    _install()
    _state.closed = True
    try:
        yield
    finally:
        _state.closed = False


@cache
def _install() -> None:
    """Audit hooks stay for the life of a process; outside the gate this one looks at one flag."""
    sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if not getattr(_state, "closed", False):
        return
    if event == "exec":
        code = arguments[0]
        if isinstance(code, CodeType) and (_is_formula(code) or _is_trusted(sys._getframe(1))):
            return
        names = getattr(code, "co_names", ())
        raise RefusedEvaluation(f"the grader's library was about to execute text that names {', '.join(names)}")
    if event in _REFUSED_EVENTS and not _is_importing(sys._getframe()):
        raise RefusedEvaluation(f"the grader's library was about to use {event}")


def _is_formula(code: CodeType) -> bool:
    if code.co_names == ("sympy",):  # its parser's own "from sympy import *"
        return True
    names_are_known = all(name in _NAMES or (len(name) == 1 and name.isalpha()) for name in code.co_names)
    return names_are_known and not any(isinstance(each, CodeType) for each in code.co_consts)


def _is_trusted(caller: FrameType) -> bool:
    return caller.f_globals.get("__name__") in _GENERATORS or _is_importing(caller)


def _is_importing(frame: FrameType | None) -> bool:
    """Whether the import system runs within the gate, which executes modules' own code."""
    while frame is not None and frame.f_code is not _GATE:
        if frame.f_code.co_filename.startswith(_IMPORT_SYSTEM):
            return True
        frame = frame.f_back
    return False


_GATE = evaluation_gate.__wrapped__.__code__  # type: ignore[attr-defined]
