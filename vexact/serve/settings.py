"""Where the server listens and what it lets in."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """Raises ``ValueError`` naming the setting, its value and the fix."""

    model_names: tuple[str, ...]  # under which requests may ask for the model; the first is told
    host: str = "127.0.0.1"
    port: int = 8000  # 0: a free one
    api_key: str | None = None
    max_body_bytes: int = 8 * 2**20
    max_queue: int = 1024  # samples that wait for a slot
    receive_timeout: float = 30.0  # seconds for a request's body to arrive
    drain_timeout: float = 30.0  # seconds that running requests get after a signal

    def __post_init__(self) -> None:
        if not self.model_names or not all(name.strip() and name.isprintable() for name in self.model_names):
            raise ValueError(
                f"served_model_name={list(self.model_names)} must hold at least one name, and none that is empty or "
                "cannot be printed"
            )
        for name, low, high in (("port", 0, 65535), ("max_body_bytes", 1, 2**31), ("max_queue", 0, 2**31)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)} must be between {low} and {high}")
        for name in ("receive_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) <= 3600:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0 and at most 3600 seconds")
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key.strip() == self.api_key != ""
        ):
            raise ValueError(
                "api_key must be printable ASCII text that neither begins nor ends with a space, which no header "
                "carries; leave it out to serve without one"
            )
        if self.api_key is None and not is_loopback(self.host):
            raise ValueError(
                f"host={self.host} can be reached from other machines, and there is no api_key: anyone could use the "
                "model; set --api_key or VEXACT_API_KEY, or listen on 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether every address that ``host`` stands for is this machine's own. An empty host is all interfaces.

    Raises ValueError for a name that stands for no address.
    """
    if not host:
        return False
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host={host!r} is no address of this machine: {error}; use 127.0.0.1") from error
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_loopback for entry in found)


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address, which accepts nobody yet. Raises ValueError if it cannot be had."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(f"cannot listen on host={host} port={port}: {error.strerror}; choose another port") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as a client writes it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
