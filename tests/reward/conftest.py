import pytest
from processes import PATIENCE_S

from vexact.reward.process import WorkerProcess
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
def hopeless(monkeypatch):
    """Names the solutions that ``timeout_s`` of a test's pools is for: graders of all others, which are only slow on a
    busy machine, get more than they can need."""

    def name(*solutions):
        class Patient(WorkerProcess):
            def assign(self, batch):
                self._solutions = {index: request.solution_str for index, request in batch}
                super().assign(batch)

            @property
            def deadline(self):
                if not (self.has_started and self.pending) or self._solutions[self.pending[0]] in solutions:
                    return self._deadline
                return self._deadline + PATIENCE_S

            @deadline.setter
            def deadline(self, value):
                self._deadline = value

        monkeypatch.setattr("vexact.reward.pool.WorkerProcess", Patient)

    return name
