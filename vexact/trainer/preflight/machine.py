"""What a run asks of machines, and what this one offers."""

from __future__ import annotations

import subprocess

from vexact.audit.doctor.machine import available_bytes, available_memory
from vexact.config import Config
from vexact.config.memory import Machine
from vexact.distributed import Layout, resolve_layout


def layout_of(config: Config) -> Layout:
    """The processes that a configuration asks for, resolved. Raises what ``resolve_layout`` does."""
    trainer = config.trainer
    return resolve_layout(Layout(trainer.nnodes, trainer.n_gpus_per_node, trainer.device, trainer.ray_address))


def machine_of(layout: Layout) -> Machine:
    """The GPUs of a machine and what is free on the fullest; on a CPU its memory, shared by the processes.

    Args:
        layout: resolved. Of a cluster, this machine's GPUs stand for those of all; without any, nothing is known.
    """
    assert layout.n_gpus_per_node is not None, "a resolved layout"
    processes = layout.n_gpus_per_node
    if layout.device == "cuda":
        free = _free_bytes()
        return Machine(layout.device, processes, min(free) if free else None, available_memory() // processes)
    return Machine(layout.device, processes, available_bytes(layout.device) // processes)


def _free_bytes() -> list[int]:
    """Of every visible GPU. Asked of the driver's tool, since asking CUDA takes half a gigabyte of the GPU for itself;
    of CUDA where there is no such tool."""
    import torch

    visible = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    command = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        free = {uuid.strip(): int(mib) * 2**20 for uuid, mib in (line.split(",") for line in lines)}
        return [free[f"GPU-{gpu.uuid}"] for gpu in visible]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return [torch.cuda.mem_get_info(i)[0] for i in range(len(visible))]
