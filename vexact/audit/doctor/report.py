"""Which checks run, in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch

from vexact.audit.doctor import expert_probes, graders, machine, model, packages, probes, several_gpus
from vexact.audit.doctor.result import CheckResult, error, ok


def machine_checks(
    run_dir: Path, cache_dir: Path, device: str, wants_wandb: bool, num_nodes: int = 1
) -> Iterator[CheckResult]:
    """Software and hardware, before anything is computed."""
    num_gpus = torch.cuda.device_count() if device == "cuda" else 0
    yield packages.check_python()
    yield from packages.check_packages(device == "cuda")
    yield from machine.check_gpus()
    yield machine.check_memory()
    yield machine.check_disk("disk of the run", run_dir)
    yield machine.check_disk("disk of the cache", cache_dir)
    yield machine.check_port()
    yield machine.check_threads()
    yield attempt("graders", graders.check_sandbox)
    yield machine.check_ray(several=num_gpus > 1 or num_nodes > 1)
    yield from several_gpus.check_several(num_gpus, num_nodes)
    yield machine.check_wandb(wants_wandb)


def probe_checks(device: str) -> Iterator[CheckResult]:
    """What the operators' bits are on ``device``."""
    exact = True
    checks = {
        "linear": probes.check_linear,
        "attention": probes.check_attention_bits,
        "logprob": probes.check_logprob,
        "experts": expert_probes.check_experts,
        "grouped products": expert_probes.check_expert_products,
    }
    for dtype in probes.DTYPES:
        for name, check in checks.items():
            result = attempt(f"probe {name}", partial(check, device, dtype))
            exact = exact and (name != "attention" or result.status == "ok")
            yield result
    if device == "cuda":
        yield from (attempt("probe tile table", partial(probes.check_tiles, device, dtype)) for dtype in probes.DTYPES)
    else:
        yield ok("probe tile table", "not tried: its tiles need a GPU")
    for dtype in probes.DTYPES:
        yield probes.check_stock_linear(device, dtype)
    yield from probes.check_attention_impls(exact)
    yield attempt("guard", lambda: model.check_guard(device))


def attempt(name: str, check: Callable[[], CheckResult]) -> CheckResult:
    """The check's result, or an error line with whatever it raised."""
    try:
        return check()
    except Exception as problem:  # a kernel that cannot be compiled or launched here is the very thing to report
        text = " ".join(str(problem).split())
        return error(name, f"{type(problem).__name__}: {text[:300]}", probes.REPORT)


def summary(results: Iterable[CheckResult]) -> str:
    """The last line."""
    counts = {"ok": 0, "warning": 0, "error": 0}
    for result in results:
        counts[result.status] += 1
    return f"{sum(counts.values())} checks: " + ", ".join(f"{count} {status}" for status, count in counts.items())
