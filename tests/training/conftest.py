"""Tiny tensors gain nothing from threads, which only wait for each other on a busy machine."""

import pytest
import torch

from vexact.training.parallel.ranks import close_process_group


@pytest.fixture(autouse=True, scope="package")
def _one_thread_and_no_process_group_left():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    close_process_group()
