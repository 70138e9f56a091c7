"""One server and one client for the tests that do not need their own."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from processes import PATIENCE_S
from serve_support import serving, tiny_engine

from vexact.serve.server import Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(tiny_engine(max_num_seqs=8, page_size=16, seed=7), max_queue=24) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as found:
        yield found
