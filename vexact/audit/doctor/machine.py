"""Memory, disk, GPUs, ports, threads and what the environment says about Ray and W&B."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

from vexact import env
from vexact.audit.doctor.packages import installed_version
from vexact.audit.doctor.result import GIB, CheckResult, error, ok, warning

MIN_CAPABILITY = (8, 0)  # bf16 tensor cores
LITTLE_GPU_MEMORY, LITTLE_MEMORY, LITTLE_DISK = 8 * GIB, 4 * GIB, 10 * GIB
NO_MEMORY, NO_DISK = 1 * GIB, 1 * GIB
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def check_gpus() -> Iterator[CheckResult]:
    """Every GPU's name, memory and driver; or why there is none."""
    driver = driver_version()
    if not torch.cuda.is_available():
        if driver is None:
            yield ok("gpu", "none; everything runs on the CPU, in fp32, for small models")
        elif torch.version.cuda is None:
            yield error(
                "gpu",
                f"driver {driver} is there, but torch {torch.__version__} is built without CUDA",
                "install torch from the index of its CUDA builds",
            )
        else:
            yield error(
                "gpu",
                f"driver {driver} is there, but torch {torch.__version__} (CUDA {torch.version.cuda}) cannot use it",
                "update the driver, or check CUDA_VISIBLE_DEVICES and the container's access to the GPUs",
            )
        return
    for index in range(torch.cuda.device_count()):
        yield check_gpu(index, driver)


def check_gpu(index: int, driver: str | None) -> CheckResult:
    """One GPU."""
    name, properties = f"gpu {index}", torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    free, total = torch.cuda.mem_get_info(index)
    text = (
        f"{properties.name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, sm_{capability[0]}{capability[1]}, "
        f"driver {driver or 'unknown'}, CUDA {torch.version.cuda}"
    )
    if capability < MIN_CAPABILITY:
        return error(name, f"{text}: too old for bf16 kernels", "use an Ampere or newer GPU, or trainer.device=cpu")
    if free < LITTLE_GPU_MEMORY:
        return warning(name, f"{text}: little free memory", "end other processes on this GPU (nvidia-smi lists them)")
    return ok(name, text)


def driver_version() -> str | None:
    """The NVIDIA driver's version by nvidia-smi; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.split()
    return lines[0] if result.returncode == 0 and lines else None


def check_memory() -> CheckResult:
    """Host memory this process may still take."""
    free = available_memory()
    text = f"{free / GIB:.1f} GiB of host memory available"
    if free < NO_MEMORY:
        return error("memory", text, "end other processes or raise the container's memory limit")
    if free < LITTLE_MEMORY:
        return warning("memory", text, "it fits tiny models only; end other processes or raise the container's limit")
    return ok("memory", text)


def available_memory() -> int:
    """Bytes, the container's limit included."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        used = int((_CGROUP_LIMIT.parent / "memory.current").read_text())
        free = min(free, int(limit) - used)
    return free


def available_bytes(device: str) -> int:
    """Free memory of the device that computes."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()


def check_disk(name: str, directory: Path) -> CheckResult:
    """Room and permission to write where ``directory`` is or will be."""
    parent = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return error(name, f"{directory} cannot be written ({parent})", "choose another directory or its permissions")
    free = shutil.disk_usage(parent).free
    text = f"{_short(directory)}: {free / GIB:.0f} GiB free"
    if free < NO_DISK:
        return error(name, text, "free some space or choose another directory")
    if free < LITTLE_DISK:
        return warning(name, text, "checkpoints take 16 bytes per parameter each; free some space")
    return ok(name, text)


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


def check_port() -> CheckResult:
    """Whether a loopback port can be had, as worker processes and servers need."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
    except OSError as problem:
        return error("port", f"no loopback port can be bound: {problem}", "allow 127.0.0.1 in the sandbox or firewall")
    return ok("port", "a free loopback port can be bound")


def check_ray(several: bool = False) -> CheckResult:
    """Whether Ray is there, and RAY_AUTH_MODE, which it reads.

    Args:
        several: a run may use several GPUs or machines.
    """
    mode, version = env.ray_auth_mode(), installed_version("ray")
    if version is None and several:
        return warning(
            "ray",
            "not installed: a run uses one GPU, unless torchrun starts it",
            "pip install 'vexact[ray]', or start runs with torchrun",
        )
    if version is None:
        return ok("ray", "not installed: runs use one process, or torchrun; RAY_AUTH_MODE does not matter")
    if mode not in ("", *env.RAY_AUTH_MODES):
        return error(
            "ray", f"{version}, RAY_AUTH_MODE={mode} is unknown", f"set it to {' or '.join(env.RAY_AUTH_MODES)}"
        )
    if mode == "disabled":
        return warning(
            "ray",
            f"{version}, RAY_AUTH_MODE=disabled: whoever reaches the cluster's ports can run code",
            "RAY_AUTH_MODE=token on every node, unless nothing else reaches these ports",
        )
    return ok("ray", f"{version}, RAY_AUTH_MODE={mode or 'token (its default)'}; it must be the same on every node")


def check_wandb(wanted: bool) -> CheckResult:
    """``wanted``: the configuration logs to W&B."""
    try:
        mode = env.wandb_mode()
    except ValueError as problem:
        return error("wandb", str(problem), f"unset WANDB_MODE or set it to one of {', '.join(env.WANDB_MODES)}")
    version, has_key = installed_version("wandb"), env.has_wandb_key()
    if version is None:
        if wanted:
            return error("wandb", "trainer.logger names wandb, which is not installed", "pip install 'vexact[wandb]'")
        return ok("wandb", "not installed and not asked for")
    if mode == "online" and not has_key:
        return warning(
            "wandb",
            f"{version}, WANDB_MODE=online without WANDB_API_KEY in the environment",
            "set WANDB_API_KEY, or check that `wandb login` was done, or WANDB_MODE=offline",
        )
    return ok("wandb", f"{version}, mode {mode}, {'a key' if has_key else 'no key'} in the environment")


def check_threads() -> CheckResult:
    """OpenMP's settings against the processors this process may use."""
    threads, policy = env.omp_settings()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{torch.get_num_threads()} threads on {usable} processors, OMP_WAIT_POLICY={policy or 'unset'}"
    if threads and not (threads.isdigit() and int(threads) > 0):
        return error("threads", f"OMP_NUM_THREADS={threads} is not a positive number", "unset it or give a number")
    if torch.get_num_threads() > usable:
        return warning("threads", f"{text}: more threads than processors", f"OMP_NUM_THREADS={usable}")
    if policy.upper() == "ACTIVE":
        return warning(
            "threads",
            f"{text}: waiting threads spin, which slows a step tenfold beside any other process",
            "OMP_WAIT_POLICY=PASSIVE, or unset it",
        )
    return ok("threads", text)
