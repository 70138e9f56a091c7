"""One optimizer step: its parts, with the moments on the device and on the host, beside torch's own norm and AdamW.

    python -m benchmarks.trainer.optimizer_step --shape qwen3-1.7b --out benchmarks/results/optimizer_step_h100.json

Peers: ``torch.nn.utils.get_total_norm`` and ``torch.optim.AdamW(fused=True)`` on the same fp32 tensors, neither of
which promises bits. ``parked`` is the way of the weights to the host and back (``param_offload``).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import Parameter

from benchmarks.shared.options import at_least_one, out_file
from benchmarks.trainer.audit import SHAPES
from vexact.models import CausalLM, ModelConfig
from vexact.training import OptimConfig
from vexact.training.optim.norm import total_norm
from vexact.training.optim.offload import Parked
from vexact.training.optim.optimizer import Optimizer
from vexact.training.parallel.ranks import Ranks


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        _wait(device)
        started = time.perf_counter()
        call()
        _wait(device)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(shapes: list[torch.Size], device: torch.device, repeats: int) -> dict[str, float]:
    parameters = [Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    found = {
        "norm": milliseconds(lambda: total_norm(gradients, Ranks(None, device)), device, repeats),
        "torch norm": milliseconds(lambda: torch.nn.utils.get_total_norm(gradients).item(), device, repeats),
    }
    peer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)
    found["torch AdamW"] = milliseconds(peer.step, device, repeats)
    del peer
    for name, offload in (("step", False), ("step, moments on the host", True)):
        optimizer = Optimizer(parameters, OptimConfig(), offload=offload)
        found[name] = milliseconds(lambda optimizer=optimizer: optimizer.step(1.0), device, repeats)
        del optimizer
    parked = Parked(parameters, enabled=True)

    def there_and_back() -> None:
        with parked.resident():
            pass

    return found | {"parked": milliseconds(there_and_back, device, repeats)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=at_least_one, default=10)
    parser.add_argument("--out", type=out_file)
    args = parser.parse_args()
    device = torch.device(args.device)
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_hf_dict(SHAPES[args.shape][0]))
    shapes = [parameter.shape for parameter in model.parameters()]
    found = {
        "shape": args.shape,
        "parameters": sum(shape.numel() for shape in shapes),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "milliseconds": measure(shapes, device, args.repeats),
    }
    text = json.dumps(found, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
