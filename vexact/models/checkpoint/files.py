"""The files of a checkpoint directory: is one there, is it what its name says, and what does its JSON hold."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)
UNFINISHED = ".unfinished-save"  # where a save puts its files until all of them are whole
_HEAD_BYTES = 256
_AGAIN = "download or copy it again"


def checkpoint_directory(path: str | Path) -> Path:
    """``path`` with ``~`` expanded.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
    """
    directory = Path(os.path.expanduser(path))
    if not directory.exists():
        raise FileNotFoundError(f"model directory {directory} does not exist; give a Hugging Face checkpoint directory")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file; give the checkpoint directory that holds it")
    return directory


def is_there(file: Path) -> bool:
    """Whether the directory has an entry of that name, be it a link that leads nowhere."""
    return file.exists() or file.is_symlink()


def require_sound(file: Path) -> None:
    """Looks at the first bytes, for the everyday ways in which a download is not the file.

    Raises:
        ValueError, FileNotFoundError, PermissionError: the message names the file, what it is, and the fix.
    """
    try:
        if not file.exists():
            what = "is a link that leads nowhere" if file.is_symlink() else "does not exist"
            raise FileNotFoundError(f"{file} {what}; {_AGAIN}")
        if not file.is_file():
            raise ValueError(
                f"{file} is {'a directory' if file.is_dir() else 'a device or pipe'}, not a file; {_AGAIN}"
            )
        with file.open("rb") as stream:
            head = stream.read(_HEAD_BYTES)
    except PermissionError as error:
        raise PermissionError(f"{file} cannot be read: permission denied; change its mode or owner") from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}; {_AGAIN}") from error
    if (problem := _impostor(head)) is not None:
        raise ValueError(f"{file} {problem}")


def _impostor(head: bytes) -> str | None:
    """What the first bytes give away, with the fix; None for nothing."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        return f"is empty; {_AGAIN}"
    if not head.strip(b"\0"):
        return f"begins with zero bytes only, the mark of a broken download; {_AGAIN}"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its directory"
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return f"is a web page or XML text (an error page, a login form?); {_AGAIN}"
    if head[8:9] == b"{":  # safetensors: eight bytes that may be anything, the header's length, then the header
        return None
    if head.startswith(b"GGUF"):
        return "is a GGUF file; give the safetensors checkpoint that it was made of"
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        return "is a PyTorch pickle or a zip archive, which is never opened; convert it to safetensors"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed; unpack it"
    return None


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ValueError, FileNotFoundError, PermissionError: it cannot be read, is not an object, or says a key twice.
    """
    require_sound(file)
    try:
        content = json.loads(file.read_bytes().decode("utf-8"), object_pairs_hook=_unique)
    except _RepeatedKey as error:
        raise ValueError(f"{file} has the key {error} twice, and only one can be meant; remove one") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a JSON {type(content).__name__}, not an object {{…}}; {_AGAIN}")
    return content


class _RepeatedKey(Exception):
    """Not a ValueError, so that JSON errors stay apart."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content and content[key] != value:
            raise _RepeatedKey(repr(key))
        content[key] = value
    return content


@lru_cache  # a run reads the same files several times
def mention(message: str) -> None:
    """Logs a warning, once."""
    log.warning(message)


def listed(names: Sequence[str], most: int = 5) -> str:
    """``a, b, c and 4 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
