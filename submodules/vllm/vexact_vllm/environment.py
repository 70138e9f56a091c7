"""The environment variables that vLLM reads: to be set before it is imported."""

from __future__ import annotations

import os


def prepare() -> None:
    """One process, so that weights move without leaving it; nothing that reaches out. What the user has set stays,
    except the first."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # the trainer's threads are in this process, too
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
