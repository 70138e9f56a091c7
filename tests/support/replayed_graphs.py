"""A stand-in for CUDA graphs: it reruns what it captured, on the same tensors, into the result it gave then."""

import torch

from vexact.rollout.execution.decode_buckets import DecodeBuckets
from vexact.rollout.execution.decode_graphs import DecodeGraphs


class Replays:
    """Captures by running twice, as CUDA does, and counts what was captured."""

    def __init__(self):
        self.num_captures = self.num_pools = 0

    def new(self):
        self.num_pools += 1
        return self.capture

    def capture(self, compute):
        self.num_captures += 1
        compute()
        output = compute()

        def replay():
            output.copy_(compute())
            return output

        return replay


def install(engine, *, sizes=(1, 2, 4), num_keys, new_capture=None):
    """Has the decode steps of an engine on the CPU run in graphs of these sizes; returns the counts."""
    replays = Replays()
    buckets = DecodeBuckets(sizes, num_keys)
    engine._runner.graphs = DecodeGraphs(
        engine.model,
        buckets,
        page_size=engine.config.page_size,
        num_slots=engine.config.max_num_seqs,
        device=torch.device("cpu"),
        new_capture=new_capture or replays.new,
    )
    return replays
