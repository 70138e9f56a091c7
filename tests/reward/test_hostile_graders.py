"""A grader may do what it likes: it costs its own sample, never the run and never another sample's score."""

import json
import logging
import threading
from pathlib import Path

import hostile_grader
import numpy as np
import pytest
from processes import PATIENCE_S, until

from vexact.report.samples.files import write_samples
from vexact.reward.pool import RewardPool
from vexact.reward.sandbox.tree import descendants
from vexact.reward.spec import GradeRequest, RewardError, RewardSpec
from vexact.types import Prompt, Sample, SampleGroup

HOSTILE = RewardSpec(hostile_grader.__file__)

OTHERS = [str(index) for index in range(12)]


@pytest.fixture
def attack_in_vain(hopeless):
    """``grade_among_others`` that waits for no attack, and long for the others."""

    def grade(*attacks):
        hopeless(*attacks)
        return grade_among_others(*attacks, timeout_s=0.4)

    return grade


def grade_among_others(*attacks, timeout_s):
    """Attacks in the middle of good samples, twice: the outcomes of the attacks, and whether all others are right."""
    solutions = [*OTHERS[:6], *attacks, *OTHERS[6:]]
    with RewardPool(1, HOSTILE, timeout_s=timeout_s) as pool:
        rounds = [pool.score([GradeRequest("mine", each, "") for each in solutions]) for _ in range(2)]
    good = [
        [(score.value, score.status) for score, text in zip(scores, solutions) if text in OTHERS] for scores in rounds
    ]
    assert good == [[(float(text), "ok") for text in OTHERS]] * 2
    return [score for scores in rounds for score, text in zip(scores, solutions) if text in attacks]


@pytest.mark.parametrize("attack", [name for name in hostile_grader.ATTACK if name not in ("fork", "forge")])
def test_an_attack_costs_its_own_sample(attack, attack_in_vain):
    first, second = attack_in_vain(attack)
    assert {first.status, second.status} <= {"error", "timeout"}
    assert (first.value, second.value) == (0.0, 0.0)
    assert (first.message + second.message).isprintable()


@pytest.mark.parametrize("attack", ["fork", "forge", *hostile_grader.HARMLESS])
def test_what_follows_an_answer_costs_nobody_else(attack):
    for score in grade_among_others(attack, timeout_s=2.0 if attack == "lock" else PATIENCE_S):
        assert (score.value, score.status) == (1.0, "ok"), score.message
        assert all(key.isprintable() and len(key) <= 700 for key in score.extra)


def test_many_attacks_at_once(attack_in_vain):
    attacks = ["fork", "garbage", "exit", "close", "stack", "kill", "patch", "1e39", "Unprintable"]
    attack_in_vain(*attacks)


def test_messages_are_escaped_and_samples_with_surrogates_are_written(caplog, tmp_path):
    with caplog.at_level(logging.WARNING), RewardPool(1, HOSTILE) as pool:
        bad, good = pool.score([GradeRequest("mine", text, "") for text in ("surrogate", "odd keys")])
    assert bad.message == r"ValueError: \ud800 \x1b[2J\x07 \u202e"
    assert "\x1b" not in caplog.text
    assert "\ud800" not in caplog.text
    one = np.zeros(1, np.float32)
    sample = Sample("r", (1,), (2,), one, one, 1.0, "stop", 0, text="lone \ud800 \x1b[31m")
    prompt = Prompt(0, (1,), "p\udfff", "mine", "\ud834")
    path = write_samples(tmp_path, 1, [SampleGroup(prompt, (sample, sample), (bad, good))])
    first, second = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (first["response"], first["ground_truth"]) == ("lone \ud800 \x1b[31m", "\ud834")
    assert second["extra"]["7"] == 2.0


def test_surrogates_reach_the_grader_and_come_back(reward_file):
    spec = reward_file("def compute_score(solution_str, ground_truth, extra_info, **_):\n"
                       "    return float(solution_str == ground_truth == extra_info['x'])\n")  # fmt: skip
    with RewardPool(1, spec) as pool:
        assert pool.score([GradeRequest("\ud801", "\udc80", "\udc80", {"x": "\udc80"})])[0].value == 1.0


def test_what_graders_print_is_shown_escaped_and_cut(reward_file, capfd):
    spec = reward_file(
        "import os\ndef compute_score(**_):\n    print('\\x1b[2J' + 'a' * 50, '\\u202e', flush=True)\n"
        "    os.write(2, b'\\xff\\x9b')\n    os.write(1, b'y' * 400_000)\n    return 1.0\n"
    )
    with RewardPool(1, spec) as pool:
        assert pool.score([GradeRequest("mine", "", "")])[0].value == 1.0
    shown = capfd.readouterr()
    assert shown.out == ""
    assert r"\x1b[2J" + "a" * 50 + r" \u202e" in shown.err
    assert "\x1b" not in shown.err
    assert len(shown.err) < 200_000
    assert "is dropped" in shown.err


def test_a_stopped_idle_worker_does_not_stall_a_large_batch(reward_file):
    spec = reward_file("import os, signal, threading, time\ndef compute_score(solution_str, **_):\n"
                       "    if solution_str == 'stop':\n"
                       "        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGSTOP)).start()\n"
                       "    return 1.0\n")  # fmt: skip
    with RewardPool(1, spec) as pool:
        pool.score([GradeRequest("mine", "stop", "")])
        (grader,) = descendants(pool.workers[0].process.pid)
        assert until(lambda: Path(f"/proc/{grader}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        pool.workers[0]._start_timeout_s = 0.5
        scores = pool.score([GradeRequest("mine", "x" * 100_000, "")] * 64)
    assert {score.status for score in scores} == {"ok"}


def test_a_worker_killed_while_starting_is_started_again(reward_file):
    """As the system does when memory runs out; and not for ever."""
    spec = reward_file(
        "import os, signal\ndef die(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "if os.environ.get('TZ') == 'DIE': die()\n"
        "def compute_score(solution_str, **_):\n    if solution_str == 'die': die()\n    return 1.0\n"
    )
    with RewardPool(1, spec) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "DIE")
        threading.Timer(0.3, patch.delenv, ("TZ",)).start()
        scores = pool.score([GradeRequest("mine", text, "") for text in ("die", "a", "b")])
        assert [score.status for score in scores] == ["error", "ok", "ok"]
        assert "memory runs out" in scores[0].message
        patch.setenv("TZ", "DIE")
        with pytest.raises(RewardError, match=r"was ended by SIGKILL .*before it was ready \(5 workers in a row\)"):
            pool.score([GradeRequest("mine", text, "") for text in ("die", "a")])
