"""A rollout that owns its weights gets all of them, and its word is not taken for more than it is."""

import pytest
import torch

from vexact.weights import WeightSyncError, WeightTaker
from vexact.weights.handover import Landing, hand_over
from vexact.weights.manifest import TensorSpec


class Taker:
    device = torch.device("cpu")

    def __init__(self, most: int = 9, says: int = 0, error: Exception | None = None):
        self.most, self.says, self.error = most, says, error
        self.weights_version, self.got = 0, {}

    def check_updatable(self):
        pass

    def take_weights(self, named_tensors, version):
        for name, tensor in named_tensors:
            self.got[name] = tensor.clone()
            if self.error is not None:
                raise self.error
            if len(self.got) == self.most:
                break
        self.weights_version = version + self.says
        return {"timing_s/weights_check": 0.5}


def tensors():
    return [("a", torch.ones(2, 3)), ("b", torch.ones(4, dtype=torch.bfloat16))]


def test_all_tensors_and_their_bytes():
    taker = Taker()
    assert isinstance(taker, WeightTaker)
    assert hand_over(taker, tensors(), 7) == {"rollout/weights_bytes": 32.0, "timing_s/weights_check": 0.5}
    assert list(taker.got) == ["a", "b"]
    assert taker.weights_version == 7


@pytest.mark.parametrize("taker", [Taker(most=1), Taker(says=-1)])
def test_a_rollout_that_left_tensors_or_another_version_is_not_believed(taker):
    with pytest.raises(
        WeightSyncError, match=r"weights version 7: the rollout left [01] tensors and says .* version [67]"
    ):
        hand_over(taker, tensors(), 7)


def test_ranks_that_gather_together_are_not_left_waiting():
    asked = []
    named = (asked.append(name) or (name, tensor) for name, tensor in tensors())
    with pytest.raises(WeightSyncError, match="no room"):
        hand_over(Taker(error=WeightSyncError("no room")), named, 7)
    assert asked == ["a", "b"]


def test_what_landed_is_handed_over_and_nothing_after_a_failure():
    taker = Taker()
    landing = Landing(taker)
    specs = (TensorSpec("a", (2, 3), torch.float32),)
    with landing.replacing_weights(3):
        landing.parameters(specs)["a"].fill_(5.0)
    assert taker.weights_version == 3
    assert torch.equal(taker.got["a"], torch.full((2, 3), 5.0))
    landing.parameters(specs)
    with pytest.raises(WeightSyncError, match="bits"), landing.replacing_weights(4):
        raise WeightSyncError("bits")
    assert taker.weights_version == 3
