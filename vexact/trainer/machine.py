"""What the machines of a run offer, and whether that is enough."""

from __future__ import annotations

import torch

from vexact.audit.doctor.machine import available_bytes, available_memory
from vexact.config import Config, ConfigError
from vexact.config.memory import Machine, ModelShape, memory_problems
from vexact.distributed import Layout


def machine_of(layout: Layout) -> Machine:
    """The memory of this machine's GPUs, or on a CPU its share for each process; other machines are taken to be alike.

    Nothing is started on a GPU that this process may not use: of several, the sizes count, of one what is free. On a
    machine without the run's GPUs nothing is known.
    """
    processes = layout.n_gpus_per_node or 1
    if layout.device == "cpu":
        return Machine("cpu", processes, available_bytes("cpu") // processes)
    if not torch.cuda.is_available():
        return Machine("cuda", processes)
    if layout.world_size == 1:
        free = available_bytes("cuda")
    else:
        free = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return Machine("cuda", processes, free, available_memory() // processes)


def layout_here(config: Config, device: str) -> Layout:
    """The processes of a run whose machines are like this one, without asking a cluster; "cpu" or "cuda"."""
    is_gpu = device == "cuda"
    per_node = config.trainer.n_gpus_per_node or (torch.cuda.device_count() if is_gpu else 1)
    return Layout(config.trainer.nnodes, per_node, "cuda" if is_gpu else "cpu")


def require_memory(config: Config, machine: Machine) -> None:
    """Raises ConfigError when a stage of a step needs more memory than there is, with what to change."""
    problems = memory_problems(config, ModelShape.read(config.model.path), machine)
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
