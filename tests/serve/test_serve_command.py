"""`vexact serve` as a process: what it prints, what it refuses, and how a signal ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
from processes import PATIENCE_S, ROOT
from serve_support import write_checkpoint

from vexact import cli

CHECKPOINT_ARGUMENTS = ("--device", "cpu", "--port", "0", "--max_num_seqs", "4", "--page_size", "16")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "model")


def start(checkpoint: Path, *arguments: str, **variables: str) -> tuple[subprocess.Popen[str], str]:
    """The process, and its address once it listens."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vexact", "serve", "--model_path", str(checkpoint), *CHECKPOINT_ARGUMENTS, *arguments],
        env={**os.environ, **variables},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.match(r"model at (http://127\.0\.0\.1:\d+/v1) \(512 tokens a request, 4 at once", line)
    assert found, line + process.communicate()[1]
    return process, found[1]


def test_sigterm_lets_what_runs_end_and_exits_130(checkpoint: Path) -> None:
    process, url = start(checkpoint, VEXACT_API_KEY="secret")
    with process, openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="none").models.list()
        stream = client.completions.create(
            model="model",
            prompt="x",
            max_tokens=150,
            stream=True,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert sum(len(chunk.choices[0].token_ids) for chunk in chunks) == 150
        assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(PATIENCE_S) == 130
        assert process.communicate() == ("", "\ninterrupted\n")


def test_a_second_signal_ends_the_process_at_once(checkpoint: Path) -> None:
    process, url = start(checkpoint)
    with process, openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = client.completions.create(  # of work for far more than the seconds that this takes
            model="model", prompt="x", max_tokens=500, n=128, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        process.send_signal(signal.SIGINT)
        time.sleep(1.1)
        assert process.poll() is None
        while process.poll() is None:  # what follows within a second belongs to the same wish
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
        assert process.wait() == 130
        with pytest.raises(openai.APIError):
            list(stream)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--host", "0.0.0.0"), "host=0.0.0.0 can be reached from other machines, and there is no api_key"),
        (("--api_key", ""), "api_key must be printable ASCII text"),
        (("--max_queue", "-1"), "max_queue=-1 must be between"),
        (("--max_model_len", "9999"), "max_model_len=9999 exceeds"),
        (("--served_model_name", ""), "served_model_name"),
    ],
)
def test_what_cannot_be_meant_is_a_message(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert cli.main(["serve", "--model_path", str(checkpoint), *CHECKPOINT_ARGUMENTS, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_missing_checkpoint_or_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["serve", "--model_path", str(tmp_path / "nowhere"), "--port", "0"]) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve", "--model_path", str(tmp_path)]) == 2
    assert "pip install 'vexact[serve]'" in capsys.readouterr().err
