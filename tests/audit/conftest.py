"""Tiny tensors gain nothing from threads, which only wait for each other on a busy machine."""

import pytest
import torch


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
