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
