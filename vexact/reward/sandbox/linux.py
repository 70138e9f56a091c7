"""System calls of Linux that Python has no name for. Each raises OSError where the kernel refuses or lacks it."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_CHILD_SUBREAPER = 1, 38, 36
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_CAPABILITY_VERSION, CAP_DAC_READ_SEARCH = 0x20080522, 2
_CAPSET = {"x86_64": 126, "aarch64": 91}


def call(number: int, *arguments: Any) -> int:
    """``syscall(number, …)``; integers and ctypes pointers."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no such system call")
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result: int = _libc().syscall(ctypes.c_long(number), *wide)
    return _checked(result)


def prctl(option: int, *arguments: Any) -> None:
    """``prctl(option, …)``."""
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no prctl")
    wide = [ctypes.c_ulong(each) if isinstance(each, int) else each for each in arguments]
    _checked(_libc().prctl(ctypes.c_int(option), *wide, *[ctypes.c_ulong(0)] * (4 - len(wide))))


def die_with_parent(signal_number: int) -> None:
    """The signal this process gets when the thread that started it ends."""
    prctl(_PR_SET_PDEATHSIG, signal_number)


def adopt_orphans() -> None:
    """Descendants whose parent dies become children of this process."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_new_privileges() -> None:
    """From here on no program grants rights this process does not have."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1)


def drop_capabilities() -> None:
    """Root keeps one right, to read files of other users, as the files of a container often belong to another."""
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    kept = 1 << CAP_DAC_READ_SEARCH if os.geteuid() == 0 else 0
    header = ctypes.create_string_buffer(struct.pack("Ii", _CAPABILITY_VERSION, 0))
    try:
        call(_CAPSET[os.uname().machine], header, _capabilities(kept))
    except PermissionError:  # this root was denied that right itself
        call(_CAPSET[os.uname().machine], header, _capabilities(0))


def _capabilities(bits: int) -> Any:
    """``struct __user_cap_data_struct[2]``: effective, permitted, inheritable; low words, then high words."""
    return ctypes.create_string_buffer(struct.pack("6I", bits, bits, 0, 0, 0, 0))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
