"""Length-prefixed messages between driver and grader process.

Pickles go to the grader. What comes back is JSON, or for a score, of which there are many, four numbers and its further
keys: whatever a grader writes to the connection, the driver runs none of it.
"""

from __future__ import annotations

import json
import pickle
import socket
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from vexact.reward.outcome import ProtocolError
from vexact.reward.text import printable

_HEADER = struct.Struct("<I")
_READ_SIZE = 1 << 16
_MAX_ANSWER = 1 << 20
_SCORE = struct.Struct("<c16sIdd")  # mark, token, index, value, seconds; the further keys follow as JSON
_SCORE_MARK = b"="
_CREDENTIALS = struct.Struct("3i")  # process, user and group of the writer, by the kernel

encode = json.JSONEncoder(separators=(",", ":")).encode  # once: json.dumps makes an encoder per call


class ScoreMessage(NamedTuple):
    """A score on its way to the driver, ``token`` being 16 ASCII characters that name the batch."""

    token: str
    sample: int
    value: float
    extra: dict[str, float]
    seconds: float


class _Frames:
    """Bytes as they arrive, cut into messages."""

    def __init__(self, limit: int | None = None) -> None:
        self._buffer, self._limit = bytearray(), limit

    def add(self, chunk: bytes) -> Iterator[bytes]:
        """The messages that ``chunk`` completes. Raises ProtocolError for a message longer than the limit."""
        self._buffer += chunk
        start = 0
        while len(self._buffer) - start >= _HEADER.size:
            body = start + _HEADER.size
            length = _HEADER.unpack_from(self._buffer, start)[0]
            if self._limit is not None and length > self._limit:
                raise ProtocolError(f"it announced a message of {length} bytes")
            if body + length > len(self._buffer):
                break
            yield bytes(self._buffer[body : body + length])
            start = body + length
        del self._buffer[:start]


class GraderEnd:
    """The grader's end: blocks."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._frames = connection, _Frames()

    def send(self, message: list[Any] | ScoreMessage) -> None:
        """Raises OSError when the other end is gone."""
        if isinstance(message, ScoreMessage):
            token, index, value, extra, seconds = message
            fixed = _SCORE.pack(_SCORE_MARK, token.encode("ascii"), index, value, seconds)
            body = fixed + _further_keys(tuple(extra.items())) if extra else fixed
        else:
            body = encode(message).encode("ascii")
        self._connection.sendall(_HEADER.pack(len(body)) + body)

    def receive(self) -> Iterator[Any]:
        """Wait for one read; the messages it completed, perhaps none. Raises EOFError when the other end is gone."""
        try:
            chunk = self._connection.recv(_READ_SIZE)
        except ConnectionResetError as error:
            raise EOFError from error
        if not chunk:
            raise EOFError
        yield from map(pickle.loads, self._frames.add(chunk))


class DriverEnd:
    """The driver's end: never blocks, and hears one process only.

    The first to speak is the grader, before it runs foreign code. The kernel names the writer of every later byte; what
    another process wrote, a fork of the grader for instance, is dropped.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._names_writer = hasattr(socket, "SO_PASSCRED")
        if self._names_writer:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._connection, self._frames = connection, _Frames(_MAX_ANSWER)
        self._speaker: int | None = None
        self._unsent = bytearray()

    def fileno(self) -> int:
        return self._connection.fileno()

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def send(self, message: Any) -> None:
        """Send what the other end takes now; ``flush`` sends the rest. Raises OSError when it is gone."""
        body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self._unsent += _HEADER.pack(len(body)) + body
        self.flush()

    def flush(self) -> None:
        """Send more of what could not be sent yet. Raises OSError when the other end is gone."""
        try:
            while self._unsent:
                del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return

    def receive(self) -> Iterator[list[Any] | ScoreMessage]:
        """The messages that one read completed, perhaps none, up to the first that is wrong.

        Raises:
            EOFError: the other end is gone.
            ProtocolError: what arrived is not a message.
        """
        try:
            chunk, writer = self._read()
        except BlockingIOError:
            return
        except ConnectionResetError as error:
            raise EOFError from error
        if not chunk:
            raise EOFError
        if self._speaker is None:
            self._speaker = writer
        if writer == self._speaker:
            yield from map(_message, self._frames.add(chunk))

    def _read(self) -> tuple[bytes, int | None]:
        if not self._names_writer:
            return self._connection.recv(_READ_SIZE), None
        # Room for the writer's name alone: descriptors that a grader sends along are not received.
        chunk, notes, _, _ = self._connection.recvmsg(_READ_SIZE, socket.CMSG_SPACE(_CREDENTIALS.size))
        for level, kind, data in notes:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
                return chunk, _CREDENTIALS.unpack(data)[0]
        return chunk, None

    def close(self) -> None:
        self._connection.close()


@lru_cache(maxsize=256)
def _further_keys(items: tuple[tuple[str, float], ...]) -> bytes:
    return encode(dict(items)).encode("ascii")


def _message(body: bytes) -> list[Any] | ScoreMessage:
    if body[:1] == _SCORE_MARK and len(body) >= _SCORE.size:
        _, token, index, value, seconds = _SCORE.unpack_from(body)
        extra = dict(_parsed_keys(body[_SCORE.size :])) if len(body) > _SCORE.size else {}
        return ScoreMessage(token.decode("latin-1"), index, value, extra, seconds)
    message = _parsed(body)
    if not isinstance(message, list):
        raise ProtocolError("it is not a list")
    return message


@lru_cache(maxsize=256)
def _parsed_keys(body: bytes) -> dict[str, Any]:
    keys = _parsed(body)
    if not isinstance(keys, dict):
        raise ProtocolError("the further keys of a score are not a dict")
    return {printable(key): value for key, value in keys.items()}


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("it is not JSON") from error
