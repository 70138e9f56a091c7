"""The Ray cluster of a run: the one that a job was submitted to, one that is named, or one of our own."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import ModuleType

from vexact import env
from vexact.distributed.errors import ClusterError
from vexact.distributed.on_ray.scratch import Scratch

log = logging.getLogger(__name__)
INSTALL = "pip install 'vexact[ray]', or start with torchrun"
AUTH = "RAY_AUTH_MODE must be the same on every node, and with `token` so must the token (RAY_AUTH_TOKEN_PATH)"
ANSWER_S = 5.0


_joined: Cluster | None = None  # while a layout is resolved, and then used


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of a cluster, with what it has in all."""

    name: str
    num_cpus: int
    num_gpus: int


@dataclass(slots=True)
class Cluster:
    """This process's connection to Ray; ``close`` ends what ``connect`` began."""

    ray: ModuleType
    address: str  # for people
    is_own: bool
    _connected_here: bool
    _scratch: Scratch | None = None

    def nodes(self) -> list[Node]:
        """Those that are alive, the ones with most GPUs first."""
        found = [
            Node(
                str(node["NodeManagerHostname"]),
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]
        return sorted(found, key=lambda node: (-node.num_gpus, -node.num_cpus, node.name))

    def close(self) -> None:
        """Disconnects, and ends a cluster of our own. Idempotent."""
        if self._connected_here:
            self._connected_here = False
            with suppress(Exception):
                self.ray.shutdown()
        if self._scratch is not None:
            self._scratch.remove()


def import_ray() -> ModuleType:
    """Ray. Raises ClusterError where it is not installed or cannot be imported."""
    env.set_ray_defaults()
    try:
        import ray
    except ImportError as error:
        absent = getattr(error, "name", None) == "ray"
        state = "is not installed" if absent else f"cannot be imported ({error})"
        raise ClusterError(f"several processes need Ray, which {state}: {INSTALL}") from error
    return ray


def connect(address: str | None, num_cpus: int, num_gpus: int) -> Cluster:
    """Joins a cluster, or starts one on this machine that ends with this process.

    Args:
        address: as ``Layout.ray_address``; None without RAY_ADDRESS starts one.
        num_cpus, num_gpus: what a cluster of our own offers.

    Raises:
        ValueError: the address, or RAY_AUTH_MODE, is of no use here.
        ClusterError: no Ray, or no answer from the cluster.
    """
    global _joined
    if env.ray_auth_mode() not in ("", *env.RAY_AUTH_MODES):
        raise ValueError(f"RAY_AUTH_MODE={env.ray_auth_mode()}: must be one of {', '.join(env.RAY_AUTH_MODES)}")
    ray = import_ray()
    source = "trainer.ray_address" if address else "RAY_ADDRESS"
    address = address or env.ray_address() or "local"
    if ray.is_initialized():
        if _joined is not None and _joined._connected_here:
            return _joined
        return Cluster(ray, "the calling program", is_own=False, _connected_here=False)
    if address == "local":
        return _start(ray, num_cpus, num_gpus)
    _joined = _join(ray, address, source)
    return _joined


def _start(ray: ModuleType, num_cpus: int, num_gpus: int) -> Cluster:
    place = Scratch()
    try:
        with _own_signals(), place.marked():
            ray.init(
                address="local",
                num_cpus=num_cpus,
                num_gpus=num_gpus,
                include_dashboard=False,
                logging_level=logging.ERROR,
                **place.options,
            )
    except BaseException as error:
        with suppress(Exception):
            ray.shutdown()
        place.remove()
        if not isinstance(error, Exception):
            raise
        raise ClusterError(f"Ray could not be started on this machine: {_first_line(error)}") from error
    return Cluster(ray, "this machine", is_own=True, _connected_here=True, _scratch=place)


def _join(ray: ModuleType, address: str, source: str) -> Cluster:
    named = f"{source}={address}"
    if "://" in address:
        raise ValueError(
            f"{named} is an address for `ray job submit` or Ray Client; run `ray job submit --address={address} -- "
            "vexact train …`, or give host:port of the head"
        )
    if address == "auto":
        address = _running(ray, named)
    _knock(address, named)
    try:
        with _own_signals():
            ray.init(address=address, logging_level=logging.ERROR)
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
        raise ClusterError(f"the Ray cluster at {named} could not be joined: {_why(error)}") from error
    log.info("joined the Ray cluster at %s", address)
    return Cluster(ray, address, is_own=False, _connected_here=True)


def _running(ray: ModuleType, named: str) -> str:
    """host:port of the cluster that was started last on this machine."""
    address: str | None = ray._private.utils.read_ray_address(None)
    if not address:
        raise ClusterError(f"{named}: no Ray cluster runs on this machine; start one with `ray start --head`")
    return address


def _knock(address: str, named: str) -> None:
    """Raises if nobody listens there: Ray itself would wait for a minute, and then abort the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"{named}: must be host:port of a Ray head, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        reason = str(error)
        if address not in named:
            reason = f"the last cluster of this machine, {address}, has ended (`ray stop` forgets it)"
        raise ClusterError(
            f"{named}: no Ray head answers there: {reason}; start one with `ray start --head`, or "
            f"unset {named.split('=')[0]} to use this machine alone"
        ) from error


def _why(error: BaseException) -> str:
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(_first_line(cause))
        cause = cause.__cause__ or cause.__context__
    text = "; ".join(dict.fromkeys(texts))
    return f"{text}; {AUTH}" if "auth" in text.lower() or "token" in text.lower() else text


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray installs a handler of SIGTERM that leaves without a word; ours stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
