"""Ports for processes under test, which nobody else is given meanwhile."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """A port of 127.0.0.1 that no other process gets by chance as long as this one lives.

    It stays bound here, and nobody listens. A server that asks for it by number may share it all the same, as servers
    set SO_REUSEADDR; one that was closed again could go to any connection of this machine before that server starts.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _held.append(held)
    return int(held.getsockname()[1])
