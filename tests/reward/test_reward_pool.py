import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
from processes import PATIENCE_S, until

from vexact.reward.pool import RewardPool
from vexact.reward.sandbox.policy import SandboxPolicy
from vexact.reward.spec import GradeRequest, RewardError, RewardSpec, load_function

GRADER = """
import os, re, signal, subprocess, sys, time

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    print(f"graded by {os.getpid()}", file=sys.stderr)
    match solution_str:
        case "raise":
            return 1 / 0
        case "hang":
            while True:
                time.sleep(1)
        case "hang in C":
            re.match(r"(a+)+b", "a" * 64)
        case "hang with child":
            child = subprocess.Popen(["sleep", "600"])
            open(ground_truth, "w").write(str(child.pid))
            child.wait()
        case "nan":
            return float("nan")
        case "exit":
            sys.exit(3)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "pid":
            return os.getpid()
        case "modules":
            return float(any(name in sys.modules for name in ("torch", "numpy", "transformers")))
    return {"score": float(solution_str), "length": len(solution_str)}
"""


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "grader.py"
    path.write_text(GRADER)
    return RewardSpec(str(path))


def ask(*solutions, truth=""):
    return [GradeRequest("mine", solution, truth) for solution in solutions]


def is_alive(pid):
    """False for a process that is gone or a zombie nobody will wait for."""
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # before it was opened, or before it was read
        return False


def wait_gone(pids):
    return until(lambda: not any(map(is_alive, pids)))


def test_scores_come_back_in_order(spec):
    with RewardPool(2, spec) as pool:
        scores = pool.score(ask(*map(str, range(300))))
    assert [score.value for score in scores] == [float(index) for index in range(300)]
    assert scores[123].extra == {"length": 3.0}
    assert {score.status for score in scores} == {"ok"}


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_a_grader_does_to_its_arguments_ends_with_the_call(tmp_path, num_workers):
    path = tmp_path / "grader.py"
    path.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, seen):\n"
        "    for held in (ground_truth, extra_info['seen'], seen):\n"
        "        held.append(solution_str)\n"
        "    return len(ground_truth) + len(extra_info['seen']) + len(seen)\n"
    )
    truth, extra = ["1"], {"seen": []}  # as the samples of a prompt have them: one object
    requests = [GradeRequest("mine", str(i), truth, extra) for i in range(8)]
    with RewardPool(num_workers, RewardSpec(str(path), kwargs={"seen": []})) as pool:
        assert [score.value for score in pool.score(requests) + pool.score(requests)] == [4.0] * 16
    assert (truth, extra) == (["1"], {"seen": []})


@pytest.mark.parametrize(("grade", "warns"), [("float(solution_str)", True), ("max(0, float(solution_str))", False)])
def test_a_failure_that_scores_more_than_an_answer_is_said_once(tmp_path, caplog, grade, warns):
    path = tmp_path / "grader.py"
    path.write_text(f"def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return {grade}\n")
    with RewardPool(0, RewardSpec(str(path))) as pool:
        pool.score(ask("-1", "2"))
        assert not caplog.records
        for _ in range(2):
            assert [score.value for score in pool.score(ask("-2", "none", "1"))][1] == 0
    said = [text for text in caplog.messages if "1 of 3 samples failed to be graded and score 0, more than" in text]
    assert len(said) == warns


@pytest.mark.parametrize("text", ["import helper_beside", "from . import helper_beside"])
def test_a_module_beside_the_file_says_how_it_is_found(tmp_path, text):
    (tmp_path / "helper_beside.py").touch()
    (tmp_path / "grader.py").write_text(f"{text}\ndef compute_score(**kwargs): return 1\n")
    with pytest.raises(RewardError, match=f"modules beside it are found with PYTHONPATH={tmp_path}, by their plain"):
        load_function(RewardSpec(str(tmp_path / "grader.py")))


def test_bad_graders_cost_one_sample_each(spec, caplog, hopeless):
    hopeless("hang", "hang in C")
    solutions = ["1", "raise", "2", "nan", "3", "exit", "4", "crash", "5", "hang", "6", "raise", "7", "hang in C", "8"]
    with RewardPool(2, spec, timeout_s=0.5) as pool:
        with caplog.at_level(logging.WARNING):
            scores = pool.score(ask(*solutions))
        metrics = pool.take_metrics()
        assert [score.value for score in pool.score(ask("1", "2"))] == [1.0, 2.0], "the pool works on"
        assert pool.take_metrics()["reward/error_ratio"] == 0.0
    found = dict(zip(solutions, scores))
    assert [found[str(value)].value for value in range(1, 9)] == [float(value) for value in range(1, 9)]
    assert (found["raise"].status, found["raise"].message) == ("error", "ZeroDivisionError: division by zero")
    assert (found["exit"].status, found["exit"].message) == ("error", "SystemExit: 3")
    assert found["crash"].message == "the grader process was ended by SIGSEGV while grading"
    assert "must return a finite number" in found["nan"].message
    assert found["hang"].status == found["hang in C"].status == "timeout"
    assert found["hang"].message == "the grader took longer than reward.timeout_s=0.5 s and was killed"
    assert metrics["reward/error_ratio"] == 5 / 15
    assert metrics["reward/timeout_ratio"] == 2 / 15
    assert metrics["reward/time_s/max"] >= 0.5
    assert caplog.text.count("ZeroDivisionError") == 2, "logged once: message and traceback excerpt"
    assert "return 1 / 0" in caplog.text


def test_deadline_is_per_sample_not_per_batch(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ndef compute_score(**kw):\n    time.sleep(0.25)\n    return 1\n")
    with RewardPool(1, RewardSpec(str(path)), timeout_s=2.0) as pool:
        assert {score.status for score in pool.score(ask(*"abcdefghij"))} == {"ok"}, "more than two seconds in all"


def test_grandchildren_die_with_a_hanging_grader(spec, tmp_path):
    pid_file = tmp_path / "child.pid"
    may_write = replace(spec, sandbox=SandboxPolicy(write=(str(tmp_path),)))
    with RewardPool(1, may_write, timeout_s=3.0) as pool:
        scores = pool.score([GradeRequest("mine", "hang with child", str(pid_file)), GradeRequest("mine", "1", "")])
        assert [score.status for score in scores] == ["timeout", "ok"]
        assert wait_gone([int(pid_file.read_text())])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_samples_failing_names_the_cause(spec, num_workers):
    with (
        RewardPool(num_workers, spec) as pool,
        pytest.raises(RewardError, match=r"every one of 3 samples failed: ZeroDivisionError: .* \(2 times\)"),
    ):
        pool.score(ask("raise", "nan", "raise"))


def test_gives_up_early_when_everything_hangs(spec):
    with (
        RewardPool(8, spec, timeout_s=0.3) as pool,
        pytest.raises(RewardError, match=r"the first \d+ of 2000 samples all ran longer than reward\.timeout_s=0\.3 s"),
    ):
        pool.score(ask(*["hang"] * 2000))


def test_workers_import_neither_torch_nor_numpy(spec):
    with RewardPool(1, spec) as pool:
        assert pool.score(ask("modules"))[0].value == 0.0


def test_close_leaves_no_process(spec):
    pool = RewardPool(2, spec)
    pids = {int(score.value) for score in pool.score(ask(*["pid"] * 64))}
    assert len(pids) == 2
    assert all(map(is_alive, pids))
    pool.close()
    pool.close()
    assert wait_gone(pids)


def test_workers_are_recycled(spec):
    with RewardPool(1, spec, recycle_after=5) as pool:
        first, second, third = (pool.score(ask(*["pid"] * 3))[0].value for _ in range(3))
    assert first == second != third


def interrupted(pool):
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    pool.score(ask("hang", "hang", "1", "2"))


def test_an_interrupted_call_does_not_leak_into_the_next(spec, monkeypatch):
    with RewardPool(2, spec) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(pool, "_log_first", lambda outcome: None)
            signal.signal(signal.SIGALRM, signal.default_int_handler)
            with pytest.raises(KeyboardInterrupt):
                interrupted(pool)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        assert [score.value for score in pool.score(ask("7", "8", "9"))] == [7.0, 8.0, 9.0]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None])
def test_no_process_survives_the_driver(spec, tmp_path, how):
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        from vexact.reward.pool import RewardPool
        from vexact.reward.spec import GradeRequest, RewardSpec
        pool = RewardPool(2, RewardSpec({spec.path!r}), timeout_s=6000)
        pids = {{int(score.value) for score in pool.score([GradeRequest("m", "pid", "")] * 64)}}
        print(*pids, flush=True)
        if {how is not None}:
            pool.score([GradeRequest("m", "hang", "")] * 4)
        """)
    )
    driver = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 2
    if how is not None:
        time.sleep(0.2)
        driver.send_signal(how)
    driver.wait(timeout=PATIENCE_S)
    assert wait_gone(pids)


def test_bad_user_file_is_reported_at_start():
    with pytest.raises(RewardError, match=r"reward\.custom_reward_function\.path='/no/such\.py' is not a file"):
        RewardPool(2, RewardSpec("/no/such.py"))


def test_user_file_that_ends_the_process_is_reported(tmp_path):
    path = tmp_path / "ends.py"
    path.write_text("import os\nos._exit(5)\n")
    with pytest.raises(RewardError, match="a reward worker exited with code 5 before it was ready"):
        RewardPool(1, RewardSpec(str(path)))


def test_built_in_graders_and_unknown_data_source():
    requests = [
        GradeRequest("vexact/addition", "42", "42"),
        GradeRequest("mine", "42", "42"),
        GradeRequest("openai/gsm8k", "#### 3", "4"),
    ]
    with RewardPool(1) as pool:
        good, unknown, wrong = pool.score(requests)
    assert (good.value, good.extra) == (1.0, {"acc": 1.0})
    assert unknown.status == "error"
    assert re.search(r"no grader for data_source='mine'; known: exact_match", unknown.message)
    assert (wrong.status, wrong.value) == ("ok", 0.0)


def test_nothing_to_grade(spec):
    with RewardPool(1, spec) as pool:
        assert pool.score([]) == []
        assert pool.take_metrics() == {}


def test_inline_grading(spec):
    with RewardPool(0, spec) as pool:
        good, bad, own = pool.score(ask("1", "raise", "pid"))
    assert (good.value, bad.status, int(own.value)) == (1.0, "error", os.getpid())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_workers": -1}, r"reward\.num_workers=-1 is negative"),
        ({"timeout_s": 0}, r"reward\.timeout_s=0 must be a positive"),
        ({"timeout_s": math.inf}, r"reward\.timeout_s=inf"),
        ({"recycle_after": 0}, "^recycle_after=0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        RewardPool(**arguments)


def test_512_tiny_samples_are_quick():
    """The demo's step, which takes about 20 ms where nothing else runs; sooner or later it does so here."""
    requests = [GradeRequest("vexact/addition", str(index), "7") for index in range(512)]
    with RewardPool(2) as pool:

        def seconds():
            started = time.perf_counter()
            pool.score(requests)
            return time.perf_counter() - started

        assert until(lambda: seconds() < 0.25)
