"""Exit codes and what errors look like."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PATIENCE_S

from vexact import cli
from vexact.commands import train

ROOT = Path(__file__).resolve().parents[1]


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> int:
        raise error

    monkeypatch.setattr(train, "run", run)


def test_user_error_is_one_message_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "trainer.exactnes=off"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert (
        output.err
        == "vexact train: unknown key trainer.exactnes; did you mean trainer.exactness?\n(--debug shows where)\n"
    )


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_debug_shows_the_traceback(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VEXACT_DEBUG", "1" if how == "variable" else "0")
    with pytest.raises(ValueError, match="exactnes"):
        cli.main(["train", "trainer.exactnes=off", *(["--debug"] if how == "flag" else [])])


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(RuntimeError("a bug"), monkeypatch)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["train"])


def test_full_disk_and_our_named_exceptions_are_user_errors() -> None:
    ours = type("MismatchError", (Exception,), {"__module__": "vexact.audit.compare"})
    assert cli.is_user_error(ours("token 3 differs"))
    for number in (errno.ENOSPC, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EMFILE):
        assert cli.is_user_error(OSError(number, os.strerror(number)))
    assert not cli.is_user_error(OSError(errno.EIO, "Input/output error"))
    assert not cli.is_user_error(KeyError("x"))


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["train", "--nonsense"], ["generate"]])
def test_wrong_usage_exits_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: vexact" in capsys.readouterr().err


def test_options_may_stand_between_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(train, "run", lambda arguments: seen.append((arguments.overrides, arguments.from_env)) or 0)
    assert cli.main(["train", "a=1", "--from_env", "b=2", "c=3"]) == 0
    assert seen == [(["a=1", "b=2", "c=3"], True)]


def test_exit_code_of_the_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "run", lambda arguments: 1)
    assert cli.main(["train"]) == 1


def test_environment_sits_between_recipe_and_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(
        train, "load_config", lambda overrides: seen.append(overrides) or (_ for _ in ()).throw(ValueError("stop"))
    )
    monkeypatch.setenv("INFER_FA_IMPL", "sdpa")
    monkeypatch.setenv("model_dir", str(tmp_path))
    assert cli.main(["train", "--from_env", "a=1"]) == 2
    assert cli.main(["train", "a=1"]) == 2
    attention = "actor_rollout_ref.rollout.attn_impl=sdpa"
    assert seen == [[attention, f"actor_rollout_ref.model.path={tmp_path}", "a=1"], [attention, "a=1"]]


def test_prepare_passes_its_options_and_prints_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vexact import prepare

    calls = []
    monkeypatch.setattr(prepare, "prepare", lambda *args, **options: calls.append((args, options)) or Path("/made"))
    assert cli.main(["prepare", "random", "--arch", "qwen3-1.7b", "--out", "/o", "dtype=float32", "test_size=9"]) == 0
    assert capsys.readouterr().out == "/made\n"
    assert calls == [(("random", Path("/o")), {"arch": "qwen3-1.7b", "seed": 0, "dtype": "float32", "test_size": 9})]
    assert cli.main(["prepare", "random", "seed=3"]) == 2
    assert "'seed=3' is not an option" in capsys.readouterr().err


def test_help_config_names_what_is_near_where_nothing_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help_config", "sead"]) == 2
    assert "no key contains 'sead'; near names: " in capsys.readouterr().err


def test_a_current_directory_that_is_gone_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert cli.main(["train", "data.train_files=x.jsonl"]) == 2
    assert "the current directory is gone" in capsys.readouterr().err


def test_help_config_lists_matching_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--help_config", "rollout.top"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "actor_rollout_ref.rollout.top_p=1.0",
        "actor_rollout_ref.rollout.top_k=-1",
    ]


def test_module_and_interrupt_end_to_end() -> None:
    """A real process: the exit code of Ctrl-C, and no traceback."""
    code = (
        "import sys, time\n"
        "from vexact import cli\n"
        "from vexact.commands import train\n"
        "def run(arguments):\n"
        "    print('started', flush=True)\n"
        "    time.sleep(60)\n"
        "train.run = run\n"
        "sys.exit(cli.main(['train']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (130, "\ninterrupted\n")


def test_python_m_vexact_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "vexact", "train", "x"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("vexact train: 'x' is not an override")
