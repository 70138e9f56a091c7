"""Buckets: every element of every shard travels once and lands where it belongs, for any sizes and numbers of ranks.
The ranks are played in one process."""

import random

import pytest
import torch

from vexact.weights import checksum
from vexact.weights.buckets import ALIGNMENT, BucketPlan
from vexact.weights.manifest import TensorSpec
from vexact.weights.transfer import Buffers, Incoming, Outgoing, verdict

CPU = torch.device("cpu")


def random_tensors(rng):
    """Rows fewer than ranks, rows that do not divide, single rows, vectors, and a tensor larger than any bucket."""
    shapes = [(rng.randint(1, 9), rng.randint(1, 40)) for _ in range(4)] + [(1,), (rng.randint(2, 70),), (41, 3, 7)]
    rng.shuffle(shapes)
    return {f"t{index}": torch.randn(shape) for index, shape in enumerate(shapes)}


def shards_of(tensors, rank, num_ranks):
    """As FSDP2 deals them: ``torch.chunk`` of the rows; ranks beyond the last chunk have none."""
    for name, tensor in tensors.items():
        chunks = tensor.chunk(num_ranks)
        yield name, chunks[rank] if rank < len(chunks) else tensor[:0], tuple(tensor.shape)


def play(tensors, num_ranks, bucket_bytes, dtype, spoil=None):
    """Moves ``tensors`` into fresh parameters; returns the plan, the parameters and the verdict."""
    specs = tuple(TensorSpec(name, tuple(tensor.shape), dtype) for name, tensor in tensors.items())
    plan = BucketPlan.of(specs, num_ranks, bucket_bytes)
    held = {name: torch.full_like(tensor, 7.0, dtype=dtype) for name, tensor in tensors.items()}
    outgoing = [Outgoing(plan, rank, shards_of(tensors, rank, num_ranks), CPU) for rank in range(num_ranks)]
    incoming, buffers = Incoming(plan, held), Buffers(plan, CPU)
    for bucket in plan.buckets:
        slots = buffers.slots(bucket).fill_(0xA5)
        for rank in range(num_ranks):
            outgoing[rank].cast(bucket, slots[rank])
        if spoil is not None:
            spoil(bucket, slots)
        incoming.put_slots(bucket, slots)
    sent = torch.stack([one.checksums() for one in outgoing])
    return plan, held, sent, verdict(sent, incoming.checksums()).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_every_element_arrives_in_its_place(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    tensors = random_tensors(rng)
    for num_ranks in (1, 2, 3, 8):
        bucket_bytes = num_ranks * ALIGNMENT * rng.choice([1, 2, 3, 50])
        dtype = rng.choice([torch.float32, torch.bfloat16])
        plan, held, sent, (different, *_) = play(tensors, num_ranks, bucket_bytes, dtype)
        assert different == 0
        assert plan.largest_bytes <= bucket_bytes
        for index, (name, tensor) in enumerate(tensors.items()):
            whole = tensor.to(dtype)
            assert torch.equal(held[name], whole)
            own = torch.tensor([piece.tensor == index for piece in plan.pieces()])
            assert int(sent[:, own].sum()) == checksum(whole)  # the shards' stretches make up the tensor's own checksum
        assert plan.num_bytes == sum(tensor.to(dtype).nbytes for tensor in tensors.values())


def test_the_number_of_a_stretch_leads_back_to_tensor_bucket_and_rank():
    torch.manual_seed(0)
    tensors = {"a": torch.randn(9, 30), "b": torch.randn(7), "c": torch.randn(64, 10)}
    target = {}

    def flip(bucket, slots):
        for piece in bucket.pieces:
            if piece.tensor == 2 and piece.start > 0 and not target:
                target.update(bucket=bucket.index, piece=piece)
                slots[1, piece.slot_offset] ^= 1

    plan, _, sent, (different, first, expected, got) = play(tensors, 2, 1024, torch.float32, flip)
    assert (different, divmod(first, plan.num_pieces)[0]) == (1, 1)
    bucket, piece = plan.bucket_of(first % plan.num_pieces)
    assert (bucket.index, piece) == (target["bucket"], target["piece"])
    assert (expected, expected != got) == (int(sent.view(-1)[first]), True)


def test_swapped_shards_and_swapped_stretches_show():
    """Also where the two hold the same values in another order only by their place."""
    tensors = {"a": torch.ones(8, 16), "b": torch.randn(8, 16)}
    tensors["a"][4:] = 2

    def swap(bucket, slots):
        slots.copy_(slots.flip(0).clone())

    _, _, _, (different, *_) = play(tensors, 2, 1 << 20, torch.float32, swap)
    assert different == 4


def test_a_bucket_too_small_for_its_ranks_is_refused():
    specs = (TensorSpec("a", (4,), torch.float32),)
    with pytest.raises(ValueError, match="bucket_bytes=1023 leaves each of 8 ranks less than 128 bytes"):
        BucketPlan.of(specs, 8, 8 * ALIGNMENT - 1)


def test_plans_of_other_tensors_or_sizes_have_other_digests():
    def digest(shape=(4, 4), dtype=torch.float32, num_ranks=2, bucket_bytes=1024):
        return BucketPlan.of((TensorSpec("a", shape, dtype),), num_ranks, bucket_bytes).digest

    others = [digest(shape=(16,)), digest(dtype=torch.bfloat16), digest(num_ranks=1), digest()]
    assert len({*others}) == 4
    assert digest() == others[-1]
