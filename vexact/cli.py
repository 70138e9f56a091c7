"""The command `vexact`: arguments, exit codes, and how errors look.

Exit codes: 0 done, 1 the command found a failure, or a process or a machine failed, 2 the user can fix it (one
message, no traceback), 130 a signal ended it (Ctrl-C, SIGTERM, a closed terminal), 141 the reader of the output is gone
(``| head``), as if SIGPIPE had ended the command. Training goes on without one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from vexact import __version__, env, interrupt, streams

READER_GONE = 141
_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# full and read-only disks, names that are too long, links in a circle, limits of a process
_DISK, _NAME = (errno.ENOSPC, errno.EDQUOT, errno.EROFS), (errno.ENAMETOOLONG, errno.ELOOP)
_ERRNOS = (*_DISK, *_NAME, errno.EFBIG, errno.EMFILE, errno.ENFILE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Without ``argv`` it is the process's own, and so are the signals."""
    if argv is None:
        interrupt.install()
        return _command(argv)
    with interrupt.borrowed():
        return _command(argv)


def _command(argv: Sequence[str] | None) -> int:
    streams.prepare()
    try:
        code = _run(argv)
    except BrokenPipeError:
        if not streams.reader_gone():  # a pipe of our own
            raise
        streams.flush()
        return READER_GONE
    except SystemExit:  # argparse, after it has printed
        if not streams.flush():
            return READER_GONE
        raise
    return code if streams.flush() or code else READER_GONE


def _run(argv: Sequence[str] | None) -> int:
    arguments = _parse(argv)
    env.set_process_defaults()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("vexact").setLevel(logging.INFO)
    debug = arguments.debug or env.debug()
    try:
        code: int = arguments.run(arguments)
        return code if not interrupt.requested() else _interrupted(arguments.command)
    except KeyboardInterrupt as error:
        return _interrupted(arguments.command, error)
    except Exception as error:
        if interrupt.requested():  # an interrupt inside foreign code, which made another error of it
            if debug:
                traceback.print_exc()
            return _interrupted(arguments.command, error)
        if not is_user_error(error) or debug:
            raise
        if getattr(error, "is_fault", False):
            sys.stderr.write(f"vexact {arguments.command}: {_told(error)}\n")
            return 1
        sys.stderr.write(f"vexact {arguments.command}: {_told(error)}\n(--debug shows where)\n")
        return 2


def _told(error: BaseException) -> str:
    """The message, and what was noted about it on its way: the rank it comes from, for instance."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            text = f"the current directory is gone ({text}); change to one that is there"
    return "\n".join([text, *getattr(error, "__notes__", [])])


def _interrupted(command: str, error: BaseException | None = None) -> int:
    """Says so, after any failure of ours that was being dealt with, and returns the exit code."""
    while error is not None and not _is_ours(error):
        error = error.__context__
    failure = f"vexact {command}: {_told(error)}\n" if error is not None else ""
    with contextlib.suppress(OSError, ValueError):  # whoever read it may be gone, too
        sys.stderr.write(failure + interrupt.message())
    streams.flush()
    return interrupt.EXIT_CODE


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Options may stand between `key=value` arguments; argparse alone would refuse the second group."""
    root = parser()
    arguments, rest = root.parse_known_args(argv)
    if rest and ("overrides" not in arguments or any(text.startswith("-") for text in rest)):
        root.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def parser() -> argparse.ArgumentParser:
    """The argument parser with every command."""
    # here, so that signals are handled before this takes time
    from vexact.commands import doctor, generate, prepare, report, serve, train, verify

    root = argparse.ArgumentParser(
        prog="vexact",
        description="Exact reinforcement learning for language models: what is sampled is what is trained.",
    )
    root.add_argument("--version", action="version", version=f"vexact {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="command")
    for module in (train, report, prepare, generate, serve, verify, doctor):
        command = module.add_parser(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of a user error (VEXACT_DEBUG=1)")
        command.set_defaults(run=module.run)
    return root


def is_user_error(error: Exception) -> bool:
    """Whether the message alone serves the user: bad values and files, a full disk, every named exception of ours
    that does not stand for a bug in a worker process."""
    if isinstance(error, _USER_ERRORS) or (_is_ours(error) and not getattr(error, "is_bug", False)):
        return True
    return isinstance(error, OSError) and error.errno in _ERRNOS


def _is_ours(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "vexact"
