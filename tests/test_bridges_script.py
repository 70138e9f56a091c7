"""submodules/ci.sh: what is not run, what fails, and that nothing can hang; with stand-ins for Python and pip."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
from processes import PATIENCE_S, until
from stand_ins import executable

ROOT = Path(__file__).resolve().parents[1]
PYTHON = r"""
echo "$(basename "$0") $*" >>"$LOG"
case "$*" in
  *pyproject.toml) [[ "$(basename "$0")" == "${FITS:-python3.11}" ]] ;;
  "-m venv"*) mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python" ;;
  *"pip config"*) ;;
  *"pip install"*" uv") exit 1 ;;
  *"pip install"*constraints.txt) ${INSTALL:-exit "${PACKAGES:-0}"} ;;
  *"pip install"*) exit "${OURS:-0}" ;;
  *"pip uninstall"*) ;;
  *"pytest -q tests"*) ${TESTS:-exit 0} ;;
  *"pytest -q -p"*) exit "${CORE:-0}" ;;
  *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class Clone:
    """A tree with the script, three bridges and no packages."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "a tree", folder / "log"
        (self.folder / "submodules").mkdir(parents=True)
        for name in ("ci.sh", "overrides.txt"):
            shutil.copy(ROOT / "submodules" / name, self.folder / "submodules")
        (self.folder / "pyproject.toml").touch()
        for bridge in ("verl", "veomni", "vllm"):
            (self.folder / "submodules" / bridge / "tests").mkdir(parents=True)
            (self.folder / "submodules" / bridge / "pyproject.toml").touch()
            (self.folder / "submodules" / bridge / "constraints.txt").write_text("torch==2.13.0\n")
        for name in ("python3.11", "python3.12", "python3", "python3.13"):
            executable(folder / "bin" / name, PYTHON)

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {"PATH": f"{self.folder.parent}/bin:/usr/bin:/bin", "LOG": str(self.log), **variables}
        script = self.folder / "submodules" / "ci.sh"
        return subprocess.Popen(["bash", script, *arguments], env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, *arguments: str, code: int = 0, **variables: str) -> str:
        """Its messages."""
        self.log.write_text("")
        process = self.start(*arguments, **variables)
        said = process.communicate(timeout=PATIENCE_S)[1]
        assert process.returncode == code, said
        return said


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_all_bridges_are_run_and_their_environments_deleted(clone: Clone) -> None:
    said = clone.run("all")
    assert [line.split(":")[1] for line in said.splitlines() if "passed after" in line] == [" verl", " veomni", " vllm"]
    assert clone.log.read_text().count("pytest -q tests") == 3
    assert clone.log.read_text().count("pytest -q -p no:cacheprovider tests/models") == 3
    assert not list(clone.folder.rglob(".venv"))


def test_one_bridge_keeps_its_environment(clone: Clone) -> None:
    clone.run("vllm")
    assert (clone.folder / "submodules" / "vllm" / ".venv").is_dir()
    clone.run("vllm", "-k", "x")
    asked = clone.log.read_text()
    assert "install" not in asked
    assert "pytest -q tests -k x" in asked
    assert "tests/models" not in asked


def test_an_environment_that_is_half_made_is_made_anew(clone: Clone) -> None:
    """What an interrupt leaves: a Python without pip or packages, whose installations fail."""
    executable(clone.folder / "submodules" / "vllm" / ".venv" / "bin" / "python", "exit 1")
    assert "vllm: passed after" in clone.run("vllm")
    assert "python3.11 -m venv" in clone.log.read_text()


@pytest.mark.parametrize("change", ["", "torch==2.14.0\n"], ids=["first", "later"])
def test_an_interrupted_installation_is_begun_anew(clone: Clone, change: str) -> None:
    folder, pid = clone.folder / "submodules" / "vllm", clone.folder.parent / "pid"
    if change:
        clone.run("vllm")
        (folder / "constraints.txt").write_text(change)
    hang = executable(clone.folder.parent / "hang", f'echo "$$" >"{pid}"; exec sleep 999')
    process = clone.start("vllm", INSTALL=f"exec {hang}")
    assert until(lambda: pid.exists() and bool(pid.read_text()))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    (folder / ".venv" / "of before").touch()
    assert "vllm: passed after" in clone.run("vllm")
    assert not (folder / ".venv" / "of before").exists()


def test_an_environment_that_is_half_deleted_is_made_anew(clone: Clone) -> None:
    dies = '[[ "$1" != -r* || ! -d "$2" ]] || exec kill -9 "$PPID"; exec /bin/rm "$@"'
    stops = executable(clone.folder.parent / "bin" / "rm", dies)
    clone.run("all", code=-signal.SIGKILL)
    stops.unlink()
    (clone.folder / "submodules" / "verl" / ".venv" / "of before").touch()
    assert "verl: passed after" in clone.run("verl")
    assert not (clone.folder / "submodules" / "verl" / ".venv" / "of before").exists()


@pytest.mark.parametrize("bridge", ["verl", "veomni", "vllm"])
def test_every_bridge_says_which_python_it_runs_on(bridge: str) -> None:
    """The script reads two versions: from, and below."""
    project = tomllib.loads((ROOT / "submodules" / bridge / "pyproject.toml").read_text())["project"]
    assert re.fullmatch(r">=3\.11,<3\.1[34]", project["requires-python"])


def test_packages_that_cannot_be_had_fail_nothing(clone: Clone) -> None:
    said = clone.run("all", PACKAGES="1")
    assert said.count("not run: its packages cannot be had") == 3
    assert "-m pytest" not in clone.log.read_text()


def test_a_python_that_a_bridge_runs_on_is_found(clone: Clone) -> None:
    clone.run("verl", FITS="python3.13")
    assert "python3.13 -m venv" in clone.log.read_text()
    said = clone.run("veomni", FITS="python3.14")
    assert "no Python found that it runs on (requires-python in " in said
    assert "veomni: not run" in said


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"OURS": "1"}, "verl: failed: it could not be installed"),
        ({"TESTS": "exit 1"}, "verl: failed: its tests"),
        ({"TESTS": "exit 5"}, "verl: failed: its tests"),
        ({"CORE": "1"}, "verl: failed: tests of the core, with its versions"),
        ({"TESTS": "sleep 50", "VEXACT_BRIDGES_SECONDS": "1"}, "verl: failed: its tests did not end within 1 s"),
    ],
)
def test_a_failure_fails_and_the_other_bridges_are_run(clone: Clone, variables: dict[str, str], expected: str) -> None:
    said = clone.run("all", code=1, **variables)
    assert expected in said
    assert said.endswith("bridges: failed: verl veomni vllm\n")


def test_what_it_started_ends_with_it(clone: Clone) -> None:
    pid = clone.folder.parent / "pid"
    tests = executable(clone.folder.parent / "hang", f'echo "$$" >"{pid}"; exec sleep 999')
    process = clone.start("veomni", TESTS=f"exec {tests}")
    assert until(lambda: pid.exists() and bool(pid.read_text()))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert until(lambda: not Path(f"/proc/{pid.read_text().strip()}").exists())


def test_what_it_starts_can_be_interrupted(clone: Clone) -> None:
    tests = executable(clone.folder.parent / "signals", f'trap -p >"{clone.folder.parent}/ignored"')
    clone.run("veomni", TESTS=f"exec {tests}")
    assert (clone.folder.parent / "ignored").read_text() == ""


@pytest.mark.parametrize("asked", [[], ["sglang"], ["--help"]])
def test_an_unknown_bridge_is_refused(clone: Clone, asked: list[str]) -> None:
    assert clone.run(*asked, code=2) == "bridges: which one? verl veomni vllm or all\n"
