"""Which sequences one optimizer step sees."""

from __future__ import annotations

import numpy as np

from vexact.training.config import ActorConfig


def mini_batches(config: ActorConfig, update: int, num_sequences: int, epoch: int) -> list[list[int]]:
    """The indices of every mini-batch; the last one is possibly short.

    The order of a shuffled epoch depends on (data_loader_seed, update, epoch) only: nothing to restore on resume.
    """
    order = list(range(num_sequences))
    if config.shuffle:
        key = [config.data_loader_seed, update, epoch]
        order = np.random.default_rng(key).permutation(num_sequences).tolist()
    size = config.ppo_mini_batch_size
    return [order[start : start + size] for start in range(0, num_sequences, size)]
