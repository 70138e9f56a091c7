"""What a test's ranks do when native code ends one of them."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest
from ranks import spawn
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException


def end(rank: int, directory: str, number: int | None) -> None:
    (Path(directory) / str(rank)).touch()
    if number is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.kill(os.getpid(), number)


def attempts(tmp_path: Path, *numbers: int | None):
    """Directories of one rank that is ended by the first number, by the second, ..."""
    left = list(numbers)

    def prepare() -> tuple[str, int | None]:
        directory = tmp_path / str(len(left))
        directory.mkdir()
        return str(directory), left.pop(0)

    return prepare


def test_ranks_that_crash_in_native_code_begin_once_more_and_are_told_of(tmp_path):
    with pytest.warns(UserWarning, match="end: process 0 terminated with signal SIGSEGV; once more"):
        directory, _ = spawn(end, 1, attempts(tmp_path, signal.SIGSEGV, None))
    assert [path.name for path in Path(directory).iterdir()] == ["0"]


@pytest.mark.filterwarnings("ignore:.*once more")
@pytest.mark.parametrize("number", [signal.SIGKILL, None])
def test_a_second_crash_and_any_other_end_fail(tmp_path, number):
    crashes = (signal.SIGABRT, signal.SIGSEGV) if number is None else (number, None)
    with pytest.raises(ProcessExitedException, match=rf"signal {crashes[number is None].name}"):
        spawn(end, 1, attempts(tmp_path, *crashes))


def broken(rank: int) -> None:
    raise ArithmeticError("the bits differ")


def test_what_a_rank_raises_is_raised(tmp_path):
    with pytest.raises(ProcessRaisedException, match="the bits differ"):
        spawn(broken, 1, tuple)
