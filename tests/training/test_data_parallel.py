"""Two ranks over Gloo against one process: same weights, states that move between world sizes, uneven work."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_support import assert_same_bits, random_sequences, tiny_actor, weights_of

CONFIG = {
    "ppo_mini_batch_size": 6,
    "ppo_max_token_len_per_gpu": 16,
    "loss_agg_mode": "seq-mean-token-mean",
    "use_kl_loss": True,
    "entropy_coeff": 0.01,
    "enable_gradient_checkpointing": True,
}
# Each rank's share of the two mini-batches of 6 that one process takes in order; rank 1 has more micro-batches.
SHARES = ([0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11])


def batches():
    return [random_sequences(12, seed=seed, ref_logprobs=True) for seed in (0, 1)]


@contextlib.contextmanager
def process_group(rank, directory):
    store = dist.FileStore(str(Path(directory) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def train(rank, directory):
    """Two updates on two ranks, a state saved in between and restored into another actor."""
    torch.set_num_threads(1)
    with process_group(rank, directory):
        actor = tiny_actor(**CONFIG)
        first, second = ([batch[i] for i in SHARES[rank]] for batch in batches())
        audited = []
        metrics = [actor.update(first, lambda indices, logprobs: audited.append((indices, logprobs)))]
        state = actor.state_dict()
        metrics.append(actor.update(second))
        weights = weights_of(actor)

        resumed = tiny_actor(seed=99, **CONFIG)
        resumed.load_state_dict(state)
        resumed.update(second)
        assert_same_bits(weights_of(resumed), weights)

        with pytest.raises(ValueError, match="no sequences"):
            resumed.update([])
        resumed.update(second[:4] if rank == 0 else [])
        assert len(resumed.logprobs(first if rank == 0 else first[:1])) == (6 if rank == 0 else 1)
        torch.save(
            {"metrics": metrics, "weights": weights, "state": state, "audited": audited}, f"{directory}/{rank}.pt"
        )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    directory = tmp_path_factory.mktemp("two_ranks")
    mp.spawn(train, args=(str(directory),), nprocs=2, join=True)
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_ranks_train_the_weights_of_one_process(two_ranks):
    alone = tiny_actor(**CONFIG)
    for step, batch in enumerate(batches()):
        metrics = alone.update(batch)
        for rank in (0, 1):
            assert two_ranks[rank]["metrics"][step] == pytest.approx(metrics, rel=2e-4, abs=1e-6)
    assert_same_bits(two_ranks[0]["weights"], two_ranks[1]["weights"])
    torch.testing.assert_close(two_ranks[0]["weights"], weights_of(alone), rtol=1e-3, atol=1e-4)


def test_each_rank_audits_its_own_part_of_the_first_mini_batch(two_ranks):
    expected = tiny_actor(**CONFIG).logprobs(batches()[0])
    for rank in (0, 1):
        ((indices, logprobs),) = two_ranks[rank]["audited"]
        assert indices == [0, 1, 2]
        for index, values in zip(indices, logprobs, strict=True):
            np.testing.assert_array_equal(values, expected[SHARES[rank][index]])


def test_a_state_of_two_ranks_continues_on_one(two_ranks):
    assert two_ranks[1]["state"]["parameters"] == {}
    continued, alone = tiny_actor(seed=99, **CONFIG), tiny_actor(**CONFIG)
    continued.load_state_dict(two_ranks[0]["state"])
    first, second = batches()
    alone.update(first)
    continued.update(second)
    alone.update(second)
    torch.testing.assert_close(weights_of(continued), weights_of(alone), rtol=1e-3, atol=1e-4)
