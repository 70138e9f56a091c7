"""The commit in a run's record: that of the source tree that the package runs from."""

import shutil
import subprocess

import pytest

from vexact.trainer.run.record import SOURCE, source_commit

WRITER = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]


def git(root, *arguments):
    result = subprocess.run(["git", "-C", str(root), *WRITER, *arguments], capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def tree(tmp_path):
    """A source tree under git, with one commit."""
    root = tmp_path / "tree"
    root.mkdir()
    (root / "file").write_text("1")
    git(root, "init", "-q")
    git(root, "add", "file")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_source_is_the_tree_that_holds_the_package():
    assert (SOURCE / "vexact" / "trainer" / "run" / "record.py").is_file()
    assert (SOURCE / "pyproject.toml").is_file()


def test_a_changed_file_makes_the_commit_dirty(tree):
    commit = git(tree, "rev-parse", "HEAD")
    found = source_commit(tree)
    assert found
    assert commit.startswith(found)
    (tree / "file").write_text("22")
    assert source_commit(tree) == f"{found}-dirty"


def test_a_repository_that_the_environment_names_is_not_asked(tree, tmp_path, monkeypatch):
    shutil.copytree(tree, tmp_path / "other")
    (tmp_path / "other" / "file").write_text("22")
    git(tmp_path / "other", "commit", "-qam", "second")
    found = source_commit(tree)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    assert source_commit(tree) == found


def test_there_is_none_without_a_repository_or_without_git(tree, tmp_path, monkeypatch):
    (tmp_path / "wheel").mkdir()
    assert source_commit(tmp_path / "wheel") is None
    monkeypatch.setenv("PATH", str(tmp_path / "wheel"))
    assert source_commit(tree) is None
