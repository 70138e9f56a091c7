"""Weights between processes: three that train and generate, two that train for one that generates, one for two.

One start of three processes runs all checks, each on every rank; the test lists those that failed.
"""

from __future__ import annotations

import contextlib
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import process_group, spawn
from weight_ranks import (
    EXPERTS,
    GREEDY,
    after_arrival,
    engine,
    flip_first_bit_of,
    holds,
    model,
    on_arrival,
    trainer,
)

from vexact.weights import (
    WeightSyncError,
    checksum,
    named_checksums,
    receive_weights,
    send_weights,
    sync_weights,
    transfer,
)

WORLD = 3
DOWN = "layers.1.mlp.down_proj.weight"
HEAD = "embed_tokens.weight"
PLANTED = contextlib.nullcontext


class Colocated:
    """Every rank has a shard and an engine."""

    def __init__(self, rank, groups):
        self.rank, self.group, self.receivers = rank, groups[3], [0, 1, 2]

    def trainer(self, *args, **config):
        return trainer(args[0], self.group, *args[1:], **config)

    def move(self, trainer, held, version, **options):
        return sync_weights(trainer, held, version, **options)


class Disaggregated:
    """The first ``num_trainers`` ranks have shards, the others engines."""

    def __init__(self, rank, groups, num_trainers):
        self.rank, self.group, self.num_trainers = rank, groups[num_trainers], num_trainers
        self.receivers = list(range(num_trainers, WORLD))

    def trainer(self, *args, **config):
        return trainer(args[0], self.group, *args[1:], **config) if self.rank < self.num_trainers else None

    def move(self, trainer, held, version, **options):
        if trainer is not None:
            return send_weights(trainer, version, **options)
        return receive_weights(held, version)


def every_bit_arrives(layout):
    for version, (dtype, tied, size, changes) in enumerate(
        [
            (torch.float32, True, 1 << 20, {}),
            (torch.bfloat16, False, 3 * 1024, {}),
            (torch.bfloat16, True, 3 * 128, {}),
            (torch.bfloat16, False, 3 * 1024, EXPERTS),
        ]
    ):
        held = engine(50, dtype, tied=tied, **changes)
        source = layout.trainer(version, dtype, tied, changes, param_offload=not tied)
        metrics = layout.move(source, held, version, bucket_bytes=size)
        if layout.rank in layout.receivers:
            assert holds(held, version, dtype, tied, **changes)
            assert held.generate([[1, 2]], GREEDY)[0].weights_version == version
        assert metrics["rollout/weights_bytes"] == sum(p.numel() * p.element_size() for p in held.model.parameters())
        assert metrics["timing_s/weights_check"] > 0


def a_difference_is_named_by_all(layout):
    """Each fault is on one receiver only; every rank raises the same, no engine generates, and a good sync mends it."""
    victim = layout.receivers[-1]
    last = WORLD - 1 if isinstance(layout, Colocated) else layout.num_trainers - 1

    def stale(plan, bucket, slots):
        return bucket.index == 2

    def swapped(plan, bucket, slots):
        if len(slots) > 1:
            slots[:2] = slots[:2].flip(0).clone()
        elif bucket.index == 0:
            slots[0, :4] = slots[0, 4:8].clone()

    def overwritten(parameters):
        parameters[DOWN][-1] += 1

    def second_head(parameters):
        parameters[HEAD].neg_()

    faults = {
        "in flight": (on_arrival(flip_first_bit_of(DOWN, last)), DOWN, last),
        "after arrival": (after_arrival(overwritten), DOWN, last),
        "head": (after_arrival(second_head), HEAD, 0),
        "stale": (on_arrival(stale), None, None),
        "swapped": (on_arrival(swapped), HEAD, 0),
    }
    source, held = layout.trainer(7), engine(50)
    for version, (name, (fault, tensor, sender)) in enumerate(faults.items(), 1):
        held.update_weights(model(50).named_parameters(), 0)
        with fault if layout.rank == victim else PLANTED(), pytest.raises(WeightSyncError) as caught:
            layout.move(source, held, version, bucket_bytes=3 * 1024)
        found = caught.value.difference
        assert found is not None, name
        assert found.receiver == victim, name
        assert found.bucket == 2 or name != "stale"
        if tensor is not None:
            assert (found.tensor, found.sender) == (tensor, sender), name
        for word in (
            f"weights version {version}: {found.tensor}",
            f"bucket {found.bucket}",
            f"in the rollout of rank {victim}",
        ):
            assert word in str(caught.value), name
        messages = [None] * WORLD
        dist.all_gather_object(messages, str(caught.value))
        assert len({*messages}) == 1, messages
        if layout.rank in layout.receivers:
            with pytest.raises(RuntimeError, match="update the weights before generating"):
                held.generate([[1, 2]], GREEDY)
    layout.move(source, held, 9)
    if layout.rank in layout.receivers:
        assert holds(held, 7, torch.float32)
        assert held.generate([[1, 2]], GREEDY)[0].weights_version == 9


def a_rank_that_cannot_begin_stops_all_before_anything_changes(layout):
    victim = layout.receivers[-1]
    source, held = layout.trainer(7), engine(50)
    wrong = engine(50, torch.bfloat16) if layout.rank == victim else held
    with pytest.raises(ValueError if layout.rank == victim else WeightSyncError) as caught:
        layout.move(source, wrong, 4)
    assert "'embed_tokens.weight' is torch.float32, expected torch.bfloat16" in str(caught.value)
    assert layout.rank == victim or f"rank {victim} could not begin: ValueError" in str(caught.value)

    if layout.rank == victim:
        held.add_request([1, 2], GREEDY)
    with pytest.raises(RuntimeError, match="unfinished requests") as caught:
        layout.move(source, held, 5)
    assert (type(caught.value) is WeightSyncError) == (layout.rank != victim)
    held.abort_all()

    with pytest.raises(WeightSyncError, match=r"rank \d moves version \d; every rank must call for the same one"):
        layout.move(source, held, 6 if layout.rank == victim else 7)
    assert held.generate([[1, 2]], GREEDY)[0].weights_version == 0
    assert holds(held, 50, torch.float32)


def ranks_that_cut_buckets_differently_are_told(layout):
    source, held = layout.trainer(7), engine(50)
    if isinstance(layout, Colocated):
        match = "ranks 0 and 1 have different tensors or bucket_bytes"
    elif layout.num_trainers == 2:
        match = "ranks 0 and 1 send different tensors or bucket_bytes"
    else:
        return
    with pytest.raises(WeightSyncError, match=match):
        layout.move(source, held, 1, bucket_bytes=3 * 1024 * (1 + (layout.rank == 1)))
    assert held.weights_version == 0


def shards_have_the_checksums_of_the_whole(layout):
    source = layout.trainer(7)
    if source is not None:
        assert named_checksums(source.model) == {name: checksum(p) for name, p in model(7).named_parameters()}


def roles_have_to_match(layout):
    held = engine(50)
    with pytest.raises(WeightSyncError, match="0 of 3 ranks send; some have to send and some to receive"):
        receive_weights(held, 1)
    lone = trainer(7, layout.alone)
    with pytest.raises(WeightSyncError, match=r"ranks \[0, 1\] send shards \[0, 0\] of 1; each has to be sent once"):
        send_weights(lone, 1) if layout.rank < 2 else receive_weights(held, 1)
    with pytest.raises(WeightSyncError, match="3 of 3 ranks send"):
        send_weights(lone, 1)
    assert held.weights_version == 0


def corruption_on_the_wire_shows_whoever_sent_it(layout):
    """The sender's own bucket changes between its checksum and the exchange."""
    source, held = layout.trainer(7), engine(50)
    cast = transfer.Outgoing.cast

    def spoiled(self, bucket, slot=None):
        values = cast(self, bucket, slot)
        slot[1] ^= 4
        return values

    fault = mock.patch.object(transfer.Outgoing, "cast", spoiled) if layout.rank == 0 else PLANTED()
    with fault, pytest.raises(WeightSyncError) as caught:
        layout.move(source, held, 3)
    assert (caught.value.difference.sender, caught.value.difference.tensor) == (0, HEAD)


CHECKS = [
    every_bit_arrives,
    a_difference_is_named_by_all,
    a_rank_that_cannot_begin_stops_all_before_anything_changes,
    ranks_that_cut_buckets_differently_are_told,
    corruption_on_the_wire_shows_whoever_sent_it,
    shards_have_the_checksums_of_the_whole,
]


def run(rank, directory):
    with process_group(rank, WORLD, directory):
        check_all(rank, directory)


def check_all(rank, directory):
    groups = {count: dist.new_group(list(range(count))) for count in (1, 2, 3)}
    layouts = [Colocated(rank, groups), *(Disaggregated(rank, groups, count) for count in (1, 2))]
    layouts[1].alone = [dist.new_group([each]) for each in range(WORLD)][rank]
    cases = [(check, layout) for layout in layouts for check in CHECKS] + [(roles_have_to_match, layouts[1])]
    with open(f"{directory}/{rank}.log", "w", encoding="utf-8") as log:
        for check, layout in cases:
            try:
                check(layout)
            except BaseException:
                log.write(f"{check.__name__} of {type(layout).__name__}:\n{traceback.format_exc()}")
                log.flush()
                raise


def test_weights_between_three_processes(tmp_path_factory):
    made = []

    def directory():
        made.append(tmp_path_factory.mktemp("ranks"))
        return (str(made[-1]),)

    try:
        spawn(run, WORLD, directory)
    finally:
        failures = "".join((made[-1] / f"{rank}.log").read_text("utf-8") for rank in range(WORLD))
        assert failures == ""
