"""What several GPUs, or several machines, need beside the GPUs: NCCL, ways between them, names and limits."""

from __future__ import annotations

import re
import resource
import shutil
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from itertools import combinations
from pathlib import Path

import torch
import torch.distributed as dist

from vexact import env
from vexact.audit.doctor.result import GIB, CheckResult, error, ok, warning

LITTLE_SHARED_MEMORY = 1 * GIB
_SHARED_MEMORY, _INFINIBAND = Path("/dev/shm"), Path("/sys/class/infiniband")
_COLOUR = re.compile(r"\x1b\[[\d;]*m")


def check_several(num_gpus: int, num_nodes: int) -> Iterator[CheckResult]:
    """Nothing for one GPU of one machine.

    Args:
        num_gpus: of this machine; 0 for a run on the CPU.
    """
    if num_gpus < 2 and num_nodes < 2:
        return
    if num_gpus:
        yield check_nccl()
    if num_gpus > 1:
        yield check_links(num_gpus)
    yield check_shared_memory()
    yield check_locked_memory()
    yield check_host_name(num_nodes)
    if address := env.master_addr():
        yield check_master_address(address)


def check_nccl() -> CheckResult:
    """The library that carries tensors from GPU to GPU."""
    if not dist.is_nccl_available():
        return error(
            "nccl",
            f"torch {torch.__version__} is built without NCCL: GPUs cannot exchange tensors",
            "install torch for Linux from the index of its CUDA builds",
        )
    return ok("nccl", f"{'.'.join(map(str, torch.cuda.nccl.version()))}, which came with torch {torch.__version__}")


def check_links(num_gpus: int) -> CheckResult:
    """Whether GPUs reach each other's memory, and over what."""
    pairs = list(combinations(range(num_gpus), 2))
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    kinds = link_kinds()
    way = f"links {', '.join(sorted(kinds))}" if kinds else "links unknown without nvidia-smi"
    if apart:
        a, b = apart[0]
        return warning(
            "gpu links",
            f"GPUs {a} and {b} ({len(apart)} of {len(pairs)} pairs) do not reach each other's memory, so what they "
            f"exchange passes through the host; {way}",
            "runs work, slower; let the machine or its hypervisor allow peer access (PCIe ACS off)",
        )
    nvlink = "NVLink" if kinds and all(kind.startswith("NV") for kind in kinds) else "not all over NVLink"
    return ok("gpu links", f"all {num_gpus} GPUs reach each other's memory, {nvlink if kinds else way} ({way})")


def link_kinds() -> set[str]:
    """How the GPUs of this machine are connected in pairs, as ``nvidia-smi topo -m`` has it: NV18, PIX, SYS, ...

    Empty where that cannot be told.
    """
    if shutil.which("nvidia-smi") is None:
        return set()
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return set()
    rows = [row.split() for row in _COLOUR.sub("", done.stdout).splitlines()]
    gpus = [row for row in rows if row and re.fullmatch(r"GPU\d+", row[0]) and "X" in row]
    return {kind for row in gpus for kind in row[1 : 1 + len(gpus)]} - {"X"}


def check_shared_memory() -> CheckResult:
    """/dev/shm, through which NCCL and Ray pass what processes of one machine share."""
    name = "shared memory"
    if not _SHARED_MEMORY.is_dir():
        return warning(name, f"{_SHARED_MEMORY} is not there", "mount a tmpfs there; NCCL and Ray look for it")
    usage = shutil.disk_usage(_SHARED_MEMORY)
    text = f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB of {_SHARED_MEMORY} free"
    if usage.free < LITTLE_SHARED_MEMORY:
        return warning(name, text, "start the container with --shm-size=8g or --ipc=host; NCCL may fail with less")
    return ok(name, text)


def check_locked_memory() -> CheckResult:
    """`ulimit -l`: CUDA pins memory past it, what registers memory with a network card does not."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "no limit (ulimit -l)")
    text = f"at most {limit / (1 << 20):g} MiB (ulimit -l)"
    if _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir()):
        return warning(
            "locked memory",
            f"{text}, and there is an InfiniBand or RoCE card, with which NCCL has to register more",
            "ulimit -l unlimited; in a container --ulimit memlock=-1",
        )
    return ok("locked memory", f"{text}, which matters to InfiniBand only, and there is none; CUDA pins memory past it")


def check_host_name(num_nodes: int) -> CheckResult:
    """The address that this machine's own name leads to: Gloo tells other processes to connect there."""
    host = socket.gethostname()
    fix = "give it the machine's address in /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
    try:
        address = socket.gethostbyname(host)
    except OSError as problem:
        return _for_nodes(num_nodes, f"{host} does not resolve ({problem})", fix)
    if ip_address(address).is_loopback:
        return _for_nodes(num_nodes, f"{host} is {address}", fix)
    return ok("host name", f"{host} is {address}")


def _for_nodes(num_nodes: int, text: str, fix: str) -> CheckResult:
    """What processes of one machine do not mind."""
    if num_nodes > 1:
        return error("host name", f"{text}: other machines cannot connect to it", fix)
    return ok("host name", f"{text}, which is enough for one machine")


def check_master_address(address: str) -> CheckResult:
    """MASTER_ADDR, where torchrun's ranks meet."""
    try:
        found = socket.gethostbyname(address)
    except OSError as problem:
        return error(
            "master address", f"MASTER_ADDR={address} does not resolve here ({problem})", "set it to rank 0's address"
        )
    return ok("master address", f"MASTER_ADDR={address} is {found}")
