"""Landlock: no writing outside given folders, no tracing and, on newer kernels, no signals to processes outside."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable

from vexact.reward.sandbox import linux

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every architecture
_GET_VERSION, _PATH_BENEATH = 1, 1
_WRITE_FILE, _REFER, _TRUNCATE = 1 << 1, 1 << 13, 1 << 14
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # remove and make: folders, files, devices, sockets, links
_SCOPE_ABSTRACT_SOCKET, _SCOPE_SIGNAL = 1, 2
_SCOPES_SINCE, _REFER_SINCE, _TRUNCATE_SINCE = 6, 2, 3


def version() -> int:
    """The kernel's Landlock ABI. Raises OSError where there is none."""
    return linux.call(_CREATE_RULESET, 0, 0, _GET_VERSION)


def restrict(writable: Iterable[str], isolate_sockets: bool) -> None:
    """Seal this thread and all it will start; reading and executing stay free.

    Args:
        writable: folders and files that may still be written; one that does not exist is passed over.
        isolate_sockets: also keep it from abstract UNIX sockets outside, where the kernel can.

    Raises:
        OSError: the kernel has no Landlock, or ``forbid_new_privileges`` was not called.
    """
    abi = version()
    on_file = _WRITE_FILE | (_TRUNCATE if abi >= _TRUNCATE_SINCE else 0)
    on_folder = on_file | _CHANGE_FOLDER | (_REFER if abi >= _REFER_SINCE else 0)
    scopes = _SCOPE_SIGNAL | (_SCOPE_ABSTRACT_SOCKET if isolate_sockets else 0)
    attributes = struct.pack("3Q", on_folder, 0, scopes) if abi >= _SCOPES_SINCE else struct.pack("Q", on_folder)
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    ruleset = linux.call(_CREATE_RULESET, buffer, len(attributes), 0)
    try:
        for path in filter(os.path.exists, writable):
            _allow(ruleset, path, on_folder if os.path.isdir(path) else on_file)
        linux.call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, access: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("=Qi", access, descriptor)
        linux.call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.create_string_buffer(rule, len(rule)), 0)
    finally:
        os.close(descriptor)
