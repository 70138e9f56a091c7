"""Length-prefixed pickles over a socket: many small results arrive in one read."""

from __future__ import annotations

import pickle
import socket
import struct
from typing import Any

_HEADER = struct.Struct("<I")
_READ_SIZE = 1 << 16


class Channel:
    """One end of a connection between the driver and a reward worker (both run the same user's code)."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._buffer = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, message: Any) -> None:
        """Raises OSError when the other end is gone."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._connection.sendall(_HEADER.pack(len(body)) + body)

    def receive(self) -> list[Any]:
        """Block for one read; the messages it completed, perhaps none. Raises EOFError when the other end is gone."""
        try:
            chunk = self._connection.recv(_READ_SIZE)
        except ConnectionResetError as error:
            raise EOFError from error
        if not chunk:
            raise EOFError
        self._buffer += chunk
        messages, start = [], 0
        while len(self._buffer) - start >= _HEADER.size:
            body = start + _HEADER.size
            end = body + _HEADER.unpack_from(self._buffer, start)[0]
            if end > len(self._buffer):
                break
            messages.append(pickle.loads(self._buffer[body:end]))
            start = end
        del self._buffer[:start]
        return messages

    def close(self) -> None:
        self._connection.close()
