"""A system call filter: no sockets, no tracing, no signals to driver and warden. Works on every kernel since 3.17."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Literal

from vexact.reward.sandbox import linux

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _EQUAL, _GREATER_OR_EQUAL, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data
_X32_BIT = 0x40000000  # system calls of the x32 ABI, which would pass under other numbers
_AF_UNIX = 1

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_COLUMNS = ("x86_64", "aarch64")
_NUMBERS = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),  # makes sockets without the call above
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "prlimit64": (302, 261),
}
_Instruction = tuple[int, int, int, int]


def restrict(network: Literal["none", "local", "all"], protected: Sequence[int]) -> None:
    """Filter this thread and all it will start; a refused call fails with "permission denied".

    Args:
        network: none allows no socket, local allows UNIX sockets, all allows every socket.
        protected: process ids that may not be signalled or limited.

    Raises:
        OSError: the kernel has no filters, or ``forbid_new_privileges`` was not called.
    """
    program = _program(network, protected)
    packed = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    header = struct.pack("H", len(program)) + b"\0" * 6 + struct.pack("Q", ctypes.addressof(packed))
    linux.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.create_string_buffer(header, len(header)))


def _program(network: str, protected: Sequence[int]) -> list[_Instruction]:
    machine = os.uname().machine
    if machine not in _ARCHITECTURES:
        raise OSError(f"the system call numbers of {machine} are not known here")
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    program: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        refuse,
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    if machine == "x86_64":
        program += [(_GREATER_OR_EQUAL, 0, 1, _X32_BIT), refuse]
    column = _COLUMNS.index(machine)
    for name, rule in _rules(network, protected):
        program += [(_EQUAL, 0, len(rule), _NUMBERS[name][column]), *rule]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def _rules(network: str, protected: Sequence[int]) -> Iterable[tuple[str, list[_Instruction]]]:
    """What to do at each call that is not simply allowed."""
    denied = (_RETURN, 0, 0, _ERRNO | errno.EACCES)
    for name in ("ptrace", "process_vm_readv", "process_vm_writev"):
        yield name, [denied]
    if network != "all":
        yield "io_uring_setup", [denied]
        only_unix = [(_LOAD, 0, 0, _FIRST_ARGUMENT_AT), (_EQUAL, 1, 0, _AF_UNIX), denied, (_RETURN, 0, 0, _ALLOW)]
        yield "socket", [denied] if network == "none" else only_unix
    for name in ("tkill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "prlimit64"):
        yield name, _unless_first_argument(protected)
    # Groups of the protected processes, and -1: everything this user runs.
    yield "kill", _unless_first_argument([*protected, *(-each for each in protected), -1])


def _unless_first_argument(values: Sequence[int]) -> list[_Instruction]:
    """Refuse where the first argument, as 32 bits, is one of ``values``."""
    tests = [(_EQUAL, len(values) - index, 0, value & 0xFFFFFFFF) for index, value in enumerate(values)]
    return [(_LOAD, 0, 0, _FIRST_ARGUMENT_AT), *tests, (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
