"""verl on the CPU, one process that is the only rank: set before anything imports verl."""

import os
import socket

import pytest

HELD: list[socket.socket] = []


def free_port() -> int:
    """One that no other process is given meanwhile: it stays bound here, which a server that sets SO_REUSEADDR may
    share."""
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    HELD.append(held)
    return held.getsockname()[1]


os.environ |= {
    "VERL_PLATFORM": "cpu",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": str(free_port()),
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    from worker_support import write_model

    return write_model(tmp_path_factory.mktemp("model"))
