"""`vexact serve`: an OpenAI-compatible HTTP server over one engine."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vexact import env, interrupt
from vexact.config.checks.seed import check_seed

if TYPE_CHECKING:
    from vexact.rollout import Engine
    from vexact.serve.server import Server

PACKAGES = ("starlette", "uvicorn", "pydantic", "prometheus_client")
EPILOG = """\
A signal (Ctrl-C, SIGTERM) lets running requests end within --drain_timeout; a second one ends the process at once.
docs/serving.md has examples with curl and the openai client.
"""
# options that are keys of actor_rollout_ref.rollout, and of the engine
ENGINE_OPTIONS = (
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "page_size",
    "num_pages",
    "kv_cache_bytes",
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="answer requests over HTTP, as OpenAI's API does",
        description="Serve a model over HTTP with OpenAI's interface: chat and completions, text or token ids in and "
        "out, exact log-probabilities.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", required=True, help="directory of a Hugging Face checkpoint")
    add(
        "--served_model_name",
        action="append",
        metavar="NAME",
        help="name in requests; may be repeated (the directory's)",
    )
    add("--host", default="127.0.0.1", help="address to listen on; others than this machine's need a key (127.0.0.1)")
    add("--port", type=int, default=8000, help="0 is a free one (8000)")
    add("--api_key", metavar="KEY", help="key that requests must show; VEXACT_API_KEY keeps it from other users' eyes")
    add("--max_queue", type=int, default=1024, help="samples that may wait for a slot before requests get 429 (1024)")
    add("--max_body_bytes", type=int, default=8 * 2**20, help="largest request (8 MiB)")
    add("--drain_timeout", type=float, default=30.0, help="seconds that running requests get at the end (30)")
    add("--seed", type=int, default=0, help="seed of requests that bring none (0)")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    for name in ENGINE_OPTIONS:
        add(f"--{name}", type=int, help=f"the engine's {name}; see docs/configuration.md")
    add("--gpu_memory_utilization", type=float, default=0.85, help="share of free GPU memory for the KV cache (0.85)")
    add("--enforce_eager", action="store_true", help="decode without CUDA graphs")
    add("--no_prefix_caching", action="store_true", help="do not share the pages of equal prefixes")
    return parser


def run(arguments: argparse.Namespace) -> int:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"vexact serve needs {', '.join(missing)}; pip install 'vexact[serve]'")
    check_seed("--seed", arguments.seed)
    from vexact.serve.server import CLOSING_S, Server
    from vexact.serve.service import Service
    from vexact.serve.settings import ServeSettings, listening_socket

    settings = ServeSettings(
        model_names=tuple(arguments.served_model_name or [Path(arguments.model_path).resolve().name]),
        host=arguments.host,
        port=arguments.port,
        api_key=env.api_key() if arguments.api_key is None else arguments.api_key,
        max_body_bytes=arguments.max_body_bytes,
        max_queue=arguments.max_queue,
        drain_timeout=arguments.drain_timeout,
    )
    bound = listening_socket(settings.host, settings.port)  # before the model takes its time
    engine = _engine(arguments)
    with interrupt.unwinding(settings.drain_timeout + 2 * CLOSING_S):
        service = Service(engine, settings)
        server = Server(service, bound)
        try:
            server.start()
            sys.stdout.write(
                f"{settings.model_names[0]} at {server.url}/v1 ({service.max_model_len} tokens a request, "
                f"{engine.config.max_num_seqs} at once, {engine.num_cache_tokens} tokens of cache)\n"
            )
            sys.stdout.flush()
            return _watch(server, service.engine)
        finally:
            server.stop()
            service.close()


def _watch(server: Server, engine: Any) -> int:
    """Until a signal comes (KeyboardInterrupt), or the engine or the server fails: 1."""
    while server.is_alive:
        interrupt.check()
        if engine.refusal is not None:
            sys.stderr.write(f"vexact serve: {engine.refusal}\n")
            return 1
        time.sleep(0.2)
    sys.stderr.write("vexact serve: the HTTP server has ended\n")
    return 1


def _engine(arguments: argparse.Namespace) -> Engine:
    from vexact.device import resolve_device
    from vexact.rollout import Engine

    device = resolve_device(arguments.device)
    dtype = ("float32" if device == "cpu" else "bfloat16") if arguments.dtype == "auto" else arguments.dtype
    given = {name: getattr(arguments, name) for name in ENGINE_OPTIONS if getattr(arguments, name) is not None}
    return Engine(
        arguments.model_path,
        dtype=dtype,
        device=device,
        seed=arguments.seed,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
        enforce_eager=arguments.enforce_eager,
        enable_prefix_caching=not arguments.no_prefix_caching,
        **given,
    )
