"""The memory that a checkpoint is read into."""

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from vexact.training.config import OptimConfig
from vexact.training.optim.optimizer import Optimizer
from vexact.training.parallel.ranks import Ranks
from vexact.training.state.sharded import blank_state, install_state, sharded_state


class Model(nn.Module):
    """Of 48 tensors of up to 8 KiB; one has no rows here."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        shapes = [(0, 5), *((1 + index, 43) for index in range(47))]
        self.weights = nn.ParameterList(Parameter(torch.randn(shape, generator=generator)) for shape in shapes)


@pytest.mark.parametrize("offload", [False, True])
def test_a_state_is_read_into_few_pieces_and_is_the_state(offload):
    """Each alone would stay with the process when it is freed: 12 bytes per parameter that nobody uses."""
    ranks = Ranks(None, torch.device("cpu"))
    saved, read = Model(), Model()
    before, after = (Optimizer(model.parameters(), OptimConfig(), offload=offload) for model in (saved, read))
    for parameter in saved.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    before.step(1.0)
    state = sharded_state(saved, list(saved.parameters()), before, ranks, 7)
    blank = blank_state(read, after, ranks, True)
    assert blank.keys() == state.keys()
    tensors = {key: tensor for key, tensor in blank.items() if tensor.dim()}
    assert len(tensors) == 3 * 48
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors.values()}
    assert len(pieces) < 24, "of 144 tensors"
    needed = sum(tensor.nbytes for tensor in tensors.values())
    assert needed == 12 * sum(p.numel() for p in read.parameters()), "what the memory plan counts"
    assert needed <= sum(piece.nbytes() for piece in pieces.values()) <= needed + 512 * len(tensors)
    for key, tensor in blank.items():
        assert (tensor.shape, tensor.dtype) == (state[key].shape, state[key].dtype)
        tensor.copy_(state[key])
    assert install_state(read, after, ranks, blank) == 7
    for ours, theirs in zip(read.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(after.state_of(ours).exp_avg, before.state_of(theirs).exp_avg)
        assert torch.equal(after.state_of(ours).exp_avg_sq, before.state_of(theirs).exp_avg_sq)
    bare = blank_state(read, after, ranks, False)
    assert sorted(bare) == ["num_updates", *sorted(f"weight.{name}" for name, _ in read.named_parameters())]
