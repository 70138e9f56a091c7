"""What has to be equal in all processes of a run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import vexact
from vexact.distributed.errors import ClusterError
from vexact.distributed.layout import RankInfo


@dataclass(frozen=True, slots=True)
class Versions:
    """Of one process; ``vexact`` with a digest of its source, since a checkout changes without its version."""

    python: str
    vexact: str
    torch: str
    triton: str


def versions() -> Versions:
    """Those of this process; imports none of the packages."""
    return Versions(
        python=".".join(platform.python_version_tuple()[:2]),
        vexact=f"{vexact.__version__} (source {_source_digest()})",
        torch=_installed("torch"),
        triton=_installed("triton"),
    )


def check_versions(driver: Versions, infos: Sequence[RankInfo], found: Sequence[Versions]) -> None:
    """Raises ClusterError that names the first rank whose versions differ from the driver's, and all that differ.

    The driver computes no bits: of torch its release counts, not its build, and Triton does not.
    """
    reference = _Reference("rank 0", found[0]) if found else None
    for info, theirs in zip(infos, found, strict=True):
        lines = _differences(_Reference("the driver", _of_driver(driver)), _of_driver(theirs))
        if not lines and reference is not None:
            lines = _differences(reference, theirs)
        if lines:
            raise ClusterError(f"{info} has {', '.join(lines)}; install the same on every node")


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str
    versions: Versions


def _of_driver(own: Versions) -> Versions:
    return Versions(own.python, own.vexact, own.torch.split("+")[0], "")


def _differences(reference: _Reference, theirs: Versions) -> list[str]:
    expected = asdict(reference.versions)
    return [
        f"{name} {value}, {reference.name} {expected[name]}"
        for name, value in asdict(theirs).items()
        if value != expected[name]
    ]


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def _source_digest() -> str:
    root, digest = Path(vexact.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
