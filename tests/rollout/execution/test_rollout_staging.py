"""The packed upload returns what went in."""

import numpy as np
import torch

from vexact.rollout.execution.staging import StagingBuffer


def test_arrays_survive_the_packed_copy_and_its_reuse():
    rng = np.random.default_rng(0)
    staging = StagingBuffer(torch.device("cpu"))
    for size in (3, 1, 40_000, 5):  # grows once, then is reused
        arrays = {
            "a": rng.integers(-(2**60), 2**60, size),
            "b": rng.integers(0, 100, (size, 3), dtype=np.int32)[:, :2],
            "c": rng.standard_normal(size).astype(np.float32),
            "none": np.empty(0, np.int64),
        }
        for name, tensor in staging.upload(arrays).items():
            assert tensor.numpy().dtype == arrays[name].dtype
            assert np.array_equal(tensor.numpy(), arrays[name])
