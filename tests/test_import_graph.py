"""Who may import whom, read from the source without importing it; and how long a file may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vexact"
LINE_CAP = 400

LEAVES = {"types", "env", "attention"}
ENGINE_ROOM = {"ops", "models", "swaps", "algorithms"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "attention": set(),
    "env": {"attention"},
    "interrupt": set(),
    "streams": set(),
    "device": set(),
    "plugins": set(),
    "ops": set(),
    "algorithms": set(),
    "models": {"device", "ops"},
    "swaps": {"ops"},
    "config": LEAVES | {"plugins"},
    "data": {"types", "interrupt"},
    "reward": LEAVES | {"interrupt", "data"},
    "report": LEAVES | {"streams"},
    "distributed": LEAVES | {"interrupt"},
    "weights": {"types", "ops", "models"},
    "rollout": {"types", "interrupt", "config", "ops", "models", "weights"},
    "training": {"types", "interrupt", "config", "ops", "models", "algorithms", "weights", "distributed"},
    "audit": LEAVES | {"interrupt", "swaps", "plugins", "ops", "models", "rollout", "training", "weights", "reward"},
    "serve": {"types", "config", "data", "rollout"},
    "prepare": LEAVES | {"interrupt", "ops", "models", "algorithms", "data", "reward", "rollout", "training"},
}
EVERYTHING_BUT = {
    "trainer": {"commands", "cli"},
    "commands": {"cli"},
    "cli": set(),
    "__main__": set(),
    "__init__": set(),
}
FORBIDDEN_BELOW = {"ray", "hydra", "omegaconf", "wandb", "tensorboard"}
RAY_USERS = {"distributed", "trainer"}


@cache
def sources() -> tuple[tuple[Path, str, ast.Module], ...]:
    """(file, the package it belongs to, its syntax tree)."""
    paths = sorted(PACKAGE.rglob("*.py"))
    tops = [path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in paths]
    return tuple((path, top, ast.parse(path.read_text(encoding="utf-8"))) for path, top in zip(paths, tops))


@cache
def imported_modules(tree: ast.Module) -> tuple[str, ...]:
    """Dotted names of every import, inside functions too; `from vexact import env` gives vexact.env."""
    return tuple(_imported_modules(tree))


def _imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            if node.module == "vexact":
                yield from (f"vexact.{alias.name}" for alias in node.names)
            else:
                yield node.module


def own_packages(tree: ast.Module) -> set[str]:
    return {name.split(".")[1] for name in imported_modules(tree) if name.startswith("vexact.")}


def violations() -> list[str]:
    found = []
    for path, top, tree in sources():
        imported = own_packages(tree) - {top, "__version__"}
        wrong = imported - ALLOWED[top] if top in ALLOWED else imported & EVERYTHING_BUT[top]
        found += [f"{path.relative_to(ROOT)} imports vexact.{name}" for name in sorted(wrong)]
    return found


def test_only_a_run_touches_the_garbage_collector() -> None:
    """An engine in a user's program leaves it alone."""
    users = {top for _, top, tree in sources() if "gc" in imported_modules(tree)}
    assert users == {"distributed", "trainer"}


def test_imports_point_one_way() -> None:
    assert violations() == []


def test_every_package_has_a_rule() -> None:
    assert {top for _, top, _ in sources()} <= set(ALLOWED) | set(EVERYTHING_BUT)


def test_the_rules_have_no_cycle() -> None:
    done: set[str] = set()
    while ready := {top for top, needs in ALLOWED.items() if top not in done and needs <= done}:
        done |= ready
    assert done == set(ALLOWED)


def test_the_engine_room_knows_no_frameworks() -> None:
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path, top, tree in sources()
        if top in ENGINE_ROOM
        for name in imported_modules(tree)
        if name.split(".")[0] in FORBIDDEN_BELOW
    ]
    assert found == []


def test_ray_stays_in_its_place() -> None:
    users = {top for _, top, tree in sources() for name in imported_modules(tree) if name.split(".")[0] == "ray"}
    assert users <= RAY_USERS


def test_no_bridge_is_imported() -> None:
    """Bridges import this package; it finds them by entry points."""
    bridged = {"verl", "veomni", "vllm", "vexact_verl", "vexact_veomni", "vexact_vllm", "submodules"}
    imported = {(path, name.split(".")[0]) for path, _, tree in sources() for name in imported_modules(tree)}
    assert [str(path) for path, top in imported if top in bridged] == []


def test_environment_variables_are_read_in_one_module() -> None:
    """Handing a whole environment to a child process (``**os.environ``) reads no variable and is fine."""
    found = []
    for path, top, tree in sources():
        if top == "env":
            continue
        passed_on = {id(value) for node in ast.walk(tree) if isinstance(node, ast.Dict) for value in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and id(node) not in passed_on:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert found == []


def test_no_file_is_longer_than_the_cap() -> None:
    files = [
        path
        for folder in ("vexact", "tests", "scripts", "benchmarks", "examples", "submodules")
        for suffix in ("*.py", "*.sh")
        for path in (ROOT / folder).rglob(suffix)
        if ".venv" not in path.parts
    ]
    assert len(files) > 50
    long = [
        str(path.relative_to(ROOT)) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > LINE_CAP
    ]
    assert long == []
