import time

import pytest

from vexact.reward.spec import GradeRequest, RewardSpec


@pytest.fixture
def reward_file(tmp_path):
    """Text of a reward function to the spec that names it."""

    def write(text, **spec):
        path = tmp_path / "reward.py"
        path.write_text(text)
        return RewardSpec(str(path), **spec)

    return write


@pytest.fixture
def ask():
    def requests(*solutions, truth=""):
        return [GradeRequest("mine", solution, truth) for solution in solutions]

    return requests


@pytest.fixture
def are_gone():
    """Whether processes end within seconds; a zombie nobody will wait for counts as gone."""

    def is_alive(pid):
        try:
            return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def check(pids, seconds=5.0):
        end = time.monotonic() + seconds
        while any(map(is_alive, pids)) and time.monotonic() < end:
            time.sleep(0.02)
        return not any(map(is_alive, pids))

    return check
