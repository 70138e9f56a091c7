"""Budget, chunking, deferral, preemption and page accounting, driven without a model."""

import random

import numpy as np
import pytest

from vexact.rollout.requests.request import Request
from vexact.rollout.sampling.sampling_params import SamplingParams
from vexact.rollout.scheduling.batch import build_batch
from vexact.rollout.scheduling.block_manager import BlockManager
from vexact.rollout.scheduling.scheduler import Scheduler
from vexact.rollout.scheduling.state import SlotState

PAGE = 4


class Harness:
    """Scheduler, state and pages; ``run`` plays the model by appending the token 7."""

    def __init__(self, *, pages=64, seqs=8, budget=32, chunked=True, caching=True, length=64):
        self.state = SlotState(seqs, length, PAGE)
        self.blocks = BlockManager(pages, PAGE)
        self.scheduler = Scheduler(
            self.state,
            self.blocks,
            max_num_batched_tokens=budget,
            enable_chunked_prefill=chunked,
            enable_prefix_caching=caching,
        )
        self.finished = {}

    def add(self, name, prompt, max_tokens=4):
        tokens = np.asarray(prompt, np.int64)
        params = SamplingParams(max_tokens=max_tokens)
        request = Request(name, tuple(tokens.tolist()), params, 0, (), tokens, [])
        self.scheduler.add(request)
        return request

    def run(self):
        """One step; returns {request id: tokens computed}."""
        schedule = self.scheduler.schedule()
        names = [self.state.request(slot).request_id for slot in schedule.slots.tolist()]
        work = dict(zip(names, schedule.num_new.tolist()))
        if not work:
            return work
        batch = build_batch(self.state, schedule)
        check_batch(self.state, schedule, batch)
        slots = batch.sample_slots
        filled = self.scheduler.commit(schedule, slots)
        zeros = np.zeros(len(slots), np.float32)
        self.state.append_sampled(slots, np.full(len(slots), 7), zeros, zeros)
        self.scheduler.share(filled)
        for slot in slots[self.state.num_tokens[slots] >= self.state.max_total_tokens[slots]].tolist():
            request = self.state.request(slot)
            self.scheduler.release(request)
            self.finished[request.request_id] = request.token_ids.tolist()
        return work


def check_batch(state, schedule, batch):
    """The vectorised batch against a loop over sequences."""
    row = 0
    for b, (slot, num_new) in enumerate(zip(schedule.slots.tolist(), schedule.num_new.tolist())):
        start = int(state.num_computed[slot])
        assert batch.cu_seqlens_q[b : b + 2].tolist() == [row, row + num_new]
        assert batch.seqused_k[b] == start + num_new
        pages = state.request(slot).pages
        assert batch.block_table[b, : len(pages)].tolist() == pages
        assert (batch.block_table[b, len(pages) :] == -1).all()
        for position in range(start, start + num_new):
            assert batch.positions[row] == position
            assert batch.input_ids[row] == state.token_ids[slot, position]
            assert batch.slot_mapping[row] == pages[position // PAGE] * PAGE + position % PAGE
            row += 1
        sampled = np.flatnonzero(batch.sample_slots == slot)
        assert len(sampled) == (start + num_new == state.num_tokens[slot])
        if len(sampled):
            assert batch.sample_rows[sampled[0]] == row - 1
            assert batch.sample_positions[sampled[0]] == start + num_new
    assert batch.num_tokens == row


def test_decodes_come_first_and_prompts_are_chunked_to_the_budget():
    engine = Harness(budget=6)
    engine.add("a", [1] * 3, max_tokens=8)
    assert engine.run() == {"a": 3}
    engine.add("b", [2] * 12)
    assert engine.run() == {"a": 1, "b": 5}
    assert engine.run() == {"a": 1, "b": 5}
    assert engine.run() == {"a": 1, "b": 2}
    assert engine.run() == {"a": 1, "b": 1}


def test_a_budget_smaller_than_the_decodes_starves_nobody_forever():
    engine = Harness(budget=2)
    for name in "abcd":
        engine.add(name, [1, 2, 3])
    for _ in range(40):
        assert sum(engine.run().values()) <= 2
    assert sorted(engine.finished) == ["a", "b", "c", "d"]


def test_without_chunking_a_prompt_waits_for_a_step_that_holds_it_whole():
    engine = Harness(budget=12, chunked=False, length=12)
    engine.add("a", [1] * 8)
    engine.add("b", [2] * 8)
    assert engine.run() == {"a": 8}
    assert engine.run() == {"a": 1, "b": 8}


def test_siblings_wait_one_step_and_share_the_prefix():
    engine = Harness()
    requests = [engine.add(f"g{i}", [3] * 10) for i in range(3)]
    other = engine.add("other", [5] * 6)
    assert engine.run() == {"g0": 10, "other": 6}
    assert engine.run() == {"g0": 1, "other": 1, "g1": 2, "g2": 2}
    shared = requests[0].pages[:2]
    assert requests[1].pages[:2] == shared
    assert requests[2].pages[:2] == shared
    assert len({request.pages[2] for request in requests}) == 3
    assert not set(shared) & set(other.pages)
    assert engine.scheduler.num_prefix_hits == 16


def test_a_deferred_sibling_keeps_its_claim_on_a_slot():
    engine = Harness(seqs=2)
    for name in ("a0", "a1", "b"):
        engine.add(name, [ord(name[0])] * 9)
    assert engine.run() == {"a0": 9}
    assert engine.run() == {"a0": 1, "a1": 1}


def test_siblings_wait_while_a_long_prompt_is_computed_in_chunks():
    engine = Harness(budget=8)
    engine.add("a", [3] * 21)
    engine.add("b", [3] * 21)
    assert engine.run() == {"a": 8}
    assert engine.run() == {"a": 8}
    assert engine.run() == {"a": 5}  # fills the last full page, so b still waits
    assert engine.run() == {"a": 1, "b": 1}


def test_a_hit_leaves_a_token_to_compute():
    engine = Harness()
    engine.add("a", [3] * 8, max_tokens=1)
    assert engine.run() == {"a": 8}
    engine.add("b", [3] * 8, max_tokens=1)
    assert engine.run() == {"b": 4}


def test_caching_off_computes_every_prompt():
    engine = Harness(caching=False)
    engine.add("a", [3] * 9)
    engine.add("b", [3] * 9)
    assert engine.run() == {"a": 9, "b": 9}
    assert engine.scheduler.num_prefix_hits == 0


def test_sampled_pages_are_shared_with_a_later_prompt():
    engine = Harness()
    engine.add("a", [1, 2, 3], max_tokens=6)
    for _ in range(6):
        engine.run()
    engine.add("b", [1, 2, 3, 7, 7, 7, 7, 7, 9])
    assert engine.run() == {"b": 1}


def test_the_last_admitted_is_preempted_and_finishes_later():
    engine = Harness(pages=5, budget=16)
    engine.add("a", [1] * 7, max_tokens=9)
    engine.add("b", [2] * 7, max_tokens=9)
    assert engine.run() == {"a": 7, "b": 7}
    seen = [engine.run() for _ in range(40)]
    assert engine.scheduler.num_preemptions >= 1
    first_alone = next(work for work in seen if len(work) == 1)
    assert list(first_alone) == ["a"]
    assert engine.finished == {"a": [1] * 7 + [7] * 9, "b": [2] * 7 + [7] * 9}
    assert engine.scheduler.take_counters()[1:] == (14, 0), "who comes back is no prompt that was looked up"
    engine.blocks.check_idle(engine.state.num_held_slots)


def test_nothing_is_looked_up_while_no_page_can_be_had(monkeypatch):
    h = Harness(pages=14, seqs=6)
    prompt = range(40)  # ten full pages, which its siblings share; each needs one of its own
    for index in range(5):
        h.add(f"r{index}", prompt, max_tokens=6)
    looked_up, match = [], h.scheduler._match
    monkeypatch.setattr(h.scheduler, "_match", lambda request: looked_up.append(request) or match(request))
    blocked = 0
    while h.scheduler.has_unfinished:
        looked_up.clear()
        waiting, running = h.scheduler.num_waiting, h.scheduler.num_running
        short = h.blocks.num_available <= running and waiting
        h.run()
        if short and h.scheduler.num_running <= running:
            blocked += 1
            assert not looked_up
    assert blocked >= 3
    assert len(h.finished) == 5


def test_no_request_is_admitted_in_a_step_that_preempts():
    engine = Harness(pages=4, budget=16, seqs=3)
    engine.add("a", [1] * 4, max_tokens=8)
    engine.add("b", [2] * 4, max_tokens=8)
    engine.run()
    before = engine.scheduler.num_preemptions
    for _ in range(60):
        preempted = engine.scheduler.num_preemptions
        work = engine.run()
        if engine.scheduler.num_preemptions > preempted:
            assert len(work) <= 1
    assert engine.scheduler.num_preemptions > before
    assert sorted(engine.finished) == ["a", "b"]


@pytest.mark.parametrize("seed", range(12))
def test_random_traffic_ends_and_leaves_nothing_behind(seed):
    """Every request ends within a bounded number of steps, whatever the limits, and the idle check holds."""
    rng = random.Random(seed)
    chunked = rng.random() < 0.7
    engine = Harness(
        pages=rng.randint(8, 20),
        seqs=rng.randint(1, 6),
        budget=rng.randint(1, 24) if chunked else 32,
        chunked=chunked,
        caching=rng.random() < 0.7,
        length=32,
    )
    expected = {}
    for index in range(30):
        prompt = [rng.randrange(2)] * rng.randint(1, 20)
        max_tokens = rng.randint(1, 32 - len(prompt))
        engine.add(str(index), prompt, max_tokens)
        expected[str(index)] = prompt + [7] * max_tokens
        if rng.random() < 0.5:
            engine.run()
    for _ in range(20000):
        if not engine.scheduler.has_unfinished:
            break
        assert engine.run(), "a step with work left did nothing"
    assert engine.finished == expected
    engine.blocks.check_idle(engine.state.num_held_slots)


def test_releasing_all_that_is_unfinished_gives_everything_back():
    engine = Harness(seqs=2)
    for name in "abc":
        engine.add(name, [1] * 9)
    engine.run()
    unfinished = engine.scheduler.unfinished
    for request in unfinished:
        engine.scheduler.release(request)
    assert [request.request_id for request in unfinished] == ["a", "b", "c"]
    assert not engine.scheduler.has_unfinished
    engine.blocks.check_idle(engine.state.num_held_slots)
