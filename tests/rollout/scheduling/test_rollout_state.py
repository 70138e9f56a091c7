"""What was sampled follows a request from slot to slot."""

import numpy as np

from vexact.rollout.requests.request import Request, request_seed
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.scheduling.state import SlotState


def request(name, prompt, stop_ids=()):
    tokens = np.array(prompt, np.int64)
    return Request(name, tuple(prompt), SamplingParams(max_tokens=8), 0, stop_ids, tokens, [])


def sample(state, requests, token, logprob, min_logit):
    slots = np.array([r.slot for r in requests])
    count = len(slots)
    floats = (np.full(count, logprob, np.float32), np.full(count, min_logit, np.float32))
    state.expect_sampled(slots)
    state.append_sampled(slots, np.full(count, token), *floats)


def test_a_preempted_request_gets_its_history_back_in_another_slot():
    state = SlotState(max_num_seqs=2, max_model_len=16, page_size=4)
    first, second = request("a", [1, 2, 3]), request("b", [4])
    state.bind(first, 0)
    sample(state, [first], 7, -0.5, 1.5)
    old_slot = first.slot
    state.unbind(first)
    state.bind(second, 0)
    assert second.slot == old_slot
    for _ in range(6):
        sample(state, [second], 9, -2.0, 2.0)
    state.bind(first, 0)
    assert first.slot != old_slot
    sample(state, [first], 8, -0.25, 2.5)
    state.unbind(first)
    assert first.token_ids.tolist() == [1, 2, 3, 7, 8]
    assert first.logprobs.tolist() == [-0.5, -0.25]
    assert first.min_logits.tolist() == [1.5, 2.5]


def test_stop_ids_of_a_slot_are_those_of_its_request():
    state = SlotState(max_num_seqs=1, max_model_len=16, page_size=4)
    many, few = request("a", [1], stop_ids=(5, 6, 7)), request("b", [1], stop_ids=(8,))
    state.bind(many, 0)
    assert set(state.stop_ids[0]) == {5, 6, 7}
    state.unbind(many)
    state.bind(few, 0)
    assert set(state.stop_ids[0]) == {8, -1}


def test_a_request_seed_is_a_stable_signed_64_bit_hash():
    """Changing this hash changes every sampled token, so its values are pinned."""
    assert request_seed(0, "a") == -3176261689564211179
    seeds = {request_seed(seed, name) for seed in range(50) for name in ("a", "b", "1", "11")}
    assert len(seeds) == 200
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
