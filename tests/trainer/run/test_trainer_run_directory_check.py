"""A run directory that training would refuse at once is refused by the dry run, which makes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vexact import cli
from vexact.trainer.run import directory
from vexact.trainer.run.directory import RunDirectoryError, check_run_directory, open_run_directory


def files_below(place: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in (place, *place.rglob("*")))


def said(refuse, *arguments) -> str:
    with pytest.raises(RunDirectoryError) as refused:
        refuse(*arguments)
    return str(refused.value)


def opened(run_dir: Path, needed_bytes: int) -> None:
    with open_run_directory(run_dir, needed_bytes):
        pass


@pytest.mark.parametrize("place", ["file", "file/run", "file/a/run", "link", "a/" + "x" * 300, "full/checkpoints"])
def test_the_check_refuses_what_a_run_would(tmp_path, place):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "checkpoints").write_text("mine")
    before = files_below(tmp_path)
    run_dir = tmp_path / place.removesuffix("/checkpoints")
    words = said(check_run_directory, run_dir, 0)
    assert files_below(tmp_path) == before
    assert words.startswith(f"the run directory {run_dir} cannot be used: ")
    assert said(opened, run_dir, 0).partition("(")[0] == words.partition("(")[0]


@pytest.mark.parametrize("place", ["run", "not/there/yet"])
def test_a_full_disk_is_told_and_a_good_place_is_left_as_it_was(tmp_path, place):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    before = files_below(tmp_path)
    check_run_directory(tmp_path / place, 1)
    assert "its disk is too full: a checkpoint needs" in said(check_run_directory, tmp_path / place, 2**80)
    assert files_below(tmp_path) == before


def test_a_disk_without_unnamed_files_is_tried_with_a_folder(tmp_path, monkeypatch):
    def without(path, flags, *more):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(directory.os, "open", without)
    check_run_directory(tmp_path / "run", 0)
    assert list(tmp_path.iterdir()) == []
    assert "cannot be used: " in said(check_run_directory, Path("/proc/no/run"), 0)


@pytest.mark.parametrize("refusing", ["access", "open"])
def test_a_place_that_refuses_writes(tmp_path, monkeypatch, refusing):
    def refuse(path, *more):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    answer = refuse if refusing == "open" else lambda path, mode: False
    monkeypatch.setattr(directory.os, refusing, answer)
    assert f"cannot be used: Permission denied ({tmp_path});" in said(check_run_directory, tmp_path / "run", 0)


def test_the_dry_run_looks_at_it(overrides, capsys, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert cli.main(["train", "--dry_run", *overrides()]) == 2
    assert "the run directory" in capsys.readouterr().err
