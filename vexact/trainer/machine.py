"""What this machine offers a run."""

from __future__ import annotations

import torch

from vexact.audit.doctor.machine import available_bytes, available_memory
from vexact.config import Config
from vexact.config.memory import Machine


def machine_of(config: Config, device: str) -> Machine:
    """The GPUs of this machine and what is free on the fullest; on a CPU its memory, shared by the processes."""
    if device == "cuda":
        gpus = config.trainer.n_gpus_per_node or torch.cuda.device_count()
        visible = range(min(gpus, torch.cuda.device_count()))
        return Machine(device, gpus, min(torch.cuda.mem_get_info(i)[0] for i in visible), available_memory() // gpus)
    processes = config.trainer.n_gpus_per_node or 1
    return Machine(device, processes, available_bytes(device) // processes)
