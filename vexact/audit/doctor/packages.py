"""Python and package versions against what this package declares."""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from vexact.audit.doctor.result import CheckResult, error, ok, warning

_PACKAGE = "vexact"
_PYPROJECT = Path(__file__).parents[3] / "pyproject.toml"
_SKIPPED_EXTRAS = ("tested", "dev")  # a pinned development set-up; other versions in range are as good


def check_python() -> CheckResult:
    """The interpreter against Requires-Python."""
    running = platform.python_version()
    supported = _requires_python()
    if supported is None:
        return warning("python", f"{running}; {_PACKAGE} is not installed, so no range is known", "pip install -e .")
    if running in SpecifierSet(supported, prereleases=True):
        return ok("python", f"{running} (supported: {supported})")
    return error("python", f"{running} is outside {supported}", f"make the environment with a Python {supported}")


def check_packages(cuda: bool) -> Iterator[CheckResult]:
    """Every required package, and optional ones that are installed in a version out of range."""
    for text in _requirements():
        requirement = Requirement(text)
        extra = _extra(requirement)
        if extra is None or (cuda and extra == "gpu"):
            yield check_package(requirement)
        elif extra not in _SKIPPED_EXTRAS:
            yield from _check_optional(requirement)


def check_package(requirement: Requirement) -> CheckResult:
    """One required package."""
    name, wanted = f"package {requirement.name}", str(requirement.specifier)
    fix = f'pip install "{requirement.name}{wanted}"'
    found = installed_version(requirement.name)
    if found is None:
        return error(name, f"not installed (needs {wanted})", fix)
    if not requirement.specifier.contains(found, prereleases=True):
        return error(name, f"{found} is outside {wanted}", fix)
    return ok(name, f"{found} (supported: {wanted})")


def _check_optional(requirement: Requirement) -> Iterator[CheckResult]:
    found = installed_version(requirement.name)
    if found is not None and not requirement.specifier.contains(found, prereleases=True):
        yield warning(
            f"package {requirement.name}",
            f"{found} is outside {requirement.specifier}; it is optional, the extra {_extra(requirement)} uses it",
            f'pip install "{requirement.name}{requirement.specifier}"',
        )


def installed_version(package: str) -> str | None:
    """The installed version; None if it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _requires_python() -> str | None:
    try:
        return str(metadata.metadata(_PACKAGE)["Requires-Python"])
    except metadata.PackageNotFoundError:
        return _checkout().get("requires-python")


def _requirements() -> list[str]:
    try:
        return metadata.requires(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        project = _checkout()
    optional = project.get("optional-dependencies", {}).items()
    extras = [f'{text}; extra == "{extra}"' for extra, texts in optional for text in texts]
    return [*project.get("dependencies", []), *extras]


def _checkout() -> dict[str, Any]:
    """The ``[project]`` table beside a package that is imported from its repository; empty elsewhere."""
    if not _PYPROJECT.is_file():
        return {}
    project: dict[str, Any] = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8")).get("project", {})
    return project if project.get("name") == "vexact" else {}


def _extra(requirement: Requirement) -> str | None:
    """The extra that brings the requirement in; None for a plain dependency."""
    text = str(requirement.marker or "")
    return text.split("==")[1].strip(" \"'") if text.startswith("extra") else None
