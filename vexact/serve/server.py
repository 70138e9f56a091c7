"""The HTTP server on a thread of its own, so that signals stay with the main thread."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from contextlib import AbstractContextManager, nullcontext

import uvicorn

from vexact.serve.app import build_app
from vexact.serve.service import Service
from vexact.serve.settings import listening_socket, url_of

CLOSING_S = 3.0  # to send what the drain left


class Server:
    """Listens when ``start`` returns; ``stop`` drains and ends it."""

    def __init__(self, service: Service, bound: socket.socket | None = None) -> None:
        """``bound``: a socket of ``listening_socket``; default: one for the service's address."""
        settings = service.settings
        self._service = service
        self._socket = bound or listening_socket(settings.host, settings.port)
        self.url = url_of(self._socket)
        config = uvicorn.Config(
            build_app(service),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(settings.drain_timeout + CLOSING_S),
        )
        self._uvicorn = _Uvicorn(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Raises RuntimeError if the server cannot start."""
        self._thread.start()
        while not self._uvicorn.started:
            if not self._thread.is_alive():
                raise RuntimeError(f"the HTTP server on {self.url} did not start; the log says why")
            time.sleep(0.005)

    def stop(self) -> None:
        """Accept nobody new, answer what runs by the service's deadline, close. Returns when the thread has ended."""
        loop = self._loop
        if loop is not None and self._thread.is_alive():
            drained = asyncio.run_coroutine_threadsafe(self._service.drain(), loop)
            self._uvicorn.should_exit = True
            self._thread.join()
            drained.cancel()
        self._socket.close()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._uvicorn.config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._uvicorn.serve(sockets=[self._socket]))


class _Uvicorn(uvicorn.Server):
    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()
