"""Commands whose reader goes away, or was never there: quiet, and training goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

from vexact import streams

ROOT = Path(__file__).resolve().parents[1]
PRINTING = (
    "import sys\n"
    "from vexact import cli\n"
    "from vexact.commands import {module}\n"
    "def run(arguments):\n"
    "    for _ in range({lines}):\n"
    "        sys.{stream}.write('a line\\n')\n"
    "    return {code}\n"
    "{module}.run = run\n"
    "sys.exit(cli.main({arguments}))\n"
)


def without_reader(code: str, *, both: bool = False, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of a process whose output (and error, with ``both``) nobody reads."""
    read, write = os.pipe()
    os.close(read)
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    error = write if both else subprocess.PIPE
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=write, stderr=error, text=True, timeout=PATIENCE_S, check=False
        )
    finally:
        os.close(write)
    return result.returncode, result.stderr or ""


def with_reader(code: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize("lines", [1, 10_000])
@pytest.mark.parametrize(("module", "arguments"), [("verify", ["verify", "--model_path", "m"]), ("doctor", ["doctor"])])
def test_a_command_without_a_reader_ends_quietly(module: str, arguments: list[str], lines: int) -> None:
    code = PRINTING.format(module=module, lines=lines, stream="stdout", code=0, arguments=arguments)
    assert without_reader(code) == (141, "")


def test_a_failure_that_is_found_before_the_reader_is_missed_keeps_its_code() -> None:
    code = PRINTING.format(module="doctor", lines=1, stream="stdout", code=1, arguments=["doctor"])
    assert without_reader(code, PYTHONUNBUFFERED="") == (1, "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "--help_config"], ["train", "nope"]])
def test_help_and_errors_without_any_reader(arguments: list[str]) -> None:
    code = f"import sys; from vexact import cli; sys.exit(cli.main({arguments}))"
    assert without_reader(code, both=True)[0] in (0, 141)


def test_a_broken_pipe_of_our_own_is_no_closed_console() -> None:
    code = (
        "import sys\nfrom vexact import cli\nfrom vexact.commands import doctor\n"
        "def run(arguments):\n    raise BrokenPipeError(32, 'to a worker')\n"
        "doctor.run = run\nsys.exit(cli.main(['doctor']))\n"
    )
    result = with_reader(code)
    assert result.returncode == 1
    assert b"to a worker" in result.stderr


def test_closed_streams_discard_and_odd_characters_are_escaped() -> None:
    code = PRINTING.format(module="doctor", lines=3, stream="stdout", code=0, arguments=["doctor"])
    script = f"exec '{sys.executable}' -c \"$CODE\" >&- 2>&-"
    environment = {**os.environ, "CODE": code}
    assert (
        subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, timeout=PATIENCE_S, check=False).returncode
        == 0
    )
    odd = code.replace("a line", "\\\\udcff é")
    result = with_reader(odd, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout[:11]) == (0, b"\\udcff \\xe9")


def test_a_lasting_stream_passes_everything_else_on(tmp_path: Path) -> None:
    with (tmp_path / "text").open("w") as file:
        stream = streams.Lasting(file, pytest.fail)
        assert stream.write("abc") == 3
        stream.flush()
        assert (stream.encoding, stream.isatty()) == (file.encoding, False)
    assert (tmp_path / "text").read_text() == "abc"
