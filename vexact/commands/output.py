"""A file that a command was told to write, looked at before the work that fills it."""

from __future__ import annotations

from pathlib import Path

_BEGINNING = 1 << 16  # bytes


class OutputError(ValueError):
    """The file cannot be written, or holds something else; the message names it."""


def check_output(option: str, path: Path, mark: bytes, kind: str) -> None:
    """
    Args:
        option: what named the file, e.g. ``--out``.
        mark: bytes in the first 64 KiB of every file of this kind, which may be replaced.
        kind: what the file will be, e.g. "report".

    Raises:
        OutputError: there is no such directory, the file is a directory or a device, or is there and of another kind.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{option} {path}: there is no directory {path.parent}")
    if path.is_dir():
        raise OutputError(f"{option} {path} is a directory; give a file in it")
    if path.is_file():
        try:
            with path.open("rb") as file:
                start = file.read(_BEGINNING)
        except OSError as error:
            raise OutputError(f"{option} {path} cannot be read ({error.strerror}); give another file") from error
        if start and mark not in start:
            raise OutputError(f"{option} {path} is there and is no {kind}; remove it, or give another file")
    elif path.exists():
        raise OutputError(f"{option} {path} is no regular file; give another")
