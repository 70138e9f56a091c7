"""A checkpoint staged from a GPU holds what was there then, whatever the stream does next."""

import pytest
import torch

from vexact.trainer.checkpoint import ShardWriter
from vexact.trainer.checkpoint.shard_reader import ShardedState

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("background", [False, True])
def test_what_was_staged_is_written(tmp_path, background):
    state = {f"weight.{n}": torch.randn(size, device="cuda") for n, size in enumerate([(5, 7), (40_000, 2048), (3,)])}
    state |= {f"exp_avg.{n}": torch.randn_like(state[f"weight.{n}"]) for n in range(3)}
    state |= {f"exp_avg_sq.{n}": torch.rand_like(state[f"weight.{n}"]).cpu().pin_memory() for n in range(3)}
    state |= {f"num_steps.{n}": torch.tensor(4) for n in range(3)} | {"num_updates": torch.tensor(4)}
    before = {key: tensor.clone().cpu() for key, tensor in state.items()}
    writer = ShardWriter(lambda: state)
    for number in range(2):  # the second time in the buffers of the first
        directory = tmp_path / f".tmp-{number}" / "trainer_state"
        directory.mkdir(parents=True)
        writer.save(number, directory, background)
        for tensor in state.values():
            tensor += 1
        if background:
            writer.wait()
        stored = ShardedState(directory)
        for key, tensor in before.items():
            if key in stored.tensors:
                assert torch.equal(stored.tensors[key].rows(0, len(tensor)), tensor), key
            tensor += 1
        assert stored.num_updates == 4 + number
