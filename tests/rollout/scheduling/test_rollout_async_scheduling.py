"""Steps that are launched before the tokens of the step before are known: no token, bit or page differs."""

from __future__ import annotations

import random

import pytest
from ahead_support import AHEAD, MAX_LEN, SYNC, fingerprint, make, serve, workload
from late_device import LateDevice, PageAuditor
from moe_configs import MOONLIGHT
from replayed_graphs import install
from rollout_models import VOCAB, bits, tiny_model

from vexact.models import ModelConfig, random_model
from vexact.rollout import Engine, SamplingParams
from vexact.rollout.execution.readback import PendingOutput
from vexact.rollout.scheduling.scheduler import Scheduler
from vexact.rollout.scheduling.state import SlotState

CASES = 60


@pytest.fixture(scope="module")
def expected():
    """Per version of the weights: every sample by its id, from requests that ran alone, one step after another."""
    engines = [make(version, max_num_seqs=1, **SYNC) for version in range(2)]
    return [
        {
            sample.request_id: sample
            for name, (prompt, params) in workload().items()
            for sample in engine.generate([prompt], params, [name])
        }
        for engine in engines
    ]


def knobs(rng):
    page_size = rng.choice([1, 2, 4, 16])
    chunked = rng.random() < 0.8
    return {
        "page_size": page_size,
        "num_pages": int(-(-82 // page_size) * rng.choice([1, 1, 1.2, 2, 6])),  # 82 tokens are the longest
        "max_num_seqs": rng.choice([2, 5, 16, 16]),
        "max_num_batched_tokens": rng.choice([3, 17, 64]) if chunked else MAX_LEN,
        "enable_chunked_prefill": chunked,
        "enable_prefix_caching": rng.random() < 0.7,
    }


def test_launching_ahead_changes_no_bit(expected, monkeypatch):
    """Whatever the knobs and however late the device; two versions of the weights, one after the other."""
    requests = workload()
    preemptions = shared = ahead = surprises = aborted = 0
    for case in range(CASES):
        rng = random.Random(case)
        engine = make(**knobs(rng), **AHEAD)
        auditor = PageAuditor(engine, monkeypatch)
        if case % 3:
            LateDevice(engine)
        else:
            install(engine, sizes=(1, 4, 16), num_keys=(32, MAX_LEN))
        for version in range(2):
            names = rng.sample(sorted(requests), 10)
            for sample in serve(engine, requests, names, rng, rng.choice([0.0, 0.05])):
                whole = expected[version][sample.request_id]
                assert sample.weights_version == version
                if sample.finish_reason == "abort":
                    count = len(sample.token_ids)
                    assert sample.token_ids == whole.token_ids[:count]
                    assert bits(sample.logprobs) == bits(whole.logprobs[:count])
                    aborted += 1
                else:
                    assert fingerprint(sample) == fingerprint(whole), (case, sample.request_id)
                    surprises += sample.finish_reason == "stop"
            if not version:
                engine.update_weights(tiny_model(1).named_parameters(), 1)
        assert auditor.num_writes
        stats = engine.stats()
        preemptions += stats["rollout/preemptions"]
        shared += stats["rollout/prefix_hit_ratio"] > 0
        ahead += stats["rollout/async_ratio"] > 0.5
        monkeypatch.undo()
    assert preemptions > 20
    assert shared > 6
    assert ahead > CASES / 2
    assert surprises > CASES
    assert aborted > CASES / 2


def test_only_a_surprise_costs_a_step():
    """A length limit is known beforehand: no row and no step is launched beyond it."""
    for ends, more in ((SamplingParams(max_tokens=7, ignore_eos=True, n=2), 0), (SamplingParams(max_tokens=40), 1)):
        steps, rows = [], []
        for mode in (SYNC, AHEAD):
            engine = make(eos_token_ids=range(0, VOCAB, 3), **mode)
            samples = engine.generate([[1, 2, 3], [4]], [ends, SamplingParams(max_tokens=3, ignore_eos=True)])
            assert {sample.finish_reason for sample in samples} == ({"length", "stop"} if more else {"length"})
            stats = engine.take_stats()
            assert stats.num_tokens == sum(len(sample.token_ids) for sample in samples)
            steps.append(stats.num_steps)
            rows.append(stats.num_ahead)
        assert steps[1] == steps[0] + more
        assert rows == [0, steps[1] - 1]


def test_the_last_step_is_not_waited_for_but_before_anything_is_touched():
    engine = make(eos_token_ids=range(VOCAB), **AHEAD)
    device = LateDevice(engine)
    for touch in (
        lambda: engine.update_weights(engine.model.named_parameters(), 1),
        engine.clear_prefix_cache,
        engine.release_kv_cache,
        lambda: engine.add_request([1], SamplingParams()),
    ):
        engine.resume_kv_cache()
        assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9))[0].finish_reason == "stop"
        assert device.num_waiting == 1
        touch()
        assert device.num_waiting == 0
    engine.abort_all()


def test_an_aborted_request_leaves_its_slot_and_name_to_the_next(expected):
    """Whose tokens must not be those that were on their way to the first."""
    requests = workload()
    params = requests["r1"][1]
    engine = make(max_num_seqs=1, **AHEAD)
    device = LateDevice(engine)
    for steps in range(1, 6):
        engine.add_request([7, 7, 7], SamplingParams(max_tokens=30, ignore_eos=True), "r1")
        for _ in range(steps):
            assert engine.step() == []
        (aborted,) = engine.abort()
        assert len(aborted.token_ids) == steps - 1
        assert device.num_waiting == 1
        samples = serve(engine, requests, ["r1"], random.Random(0))
        assert [fingerprint(sample) for sample in samples] == [
            fingerprint(expected[0][sample.request_id]) for sample in samples
        ]
        assert len(samples) == params.n


def test_who_watches_sees_the_rows_that_were_asked_for(expected):
    """Steps then wait for each other, and go on ahead when nobody watches any more; tokens may be forced."""
    requests = {"r": ([1, 2, 3], SamplingParams(max_tokens=40))}
    engine = make(**AHEAD)
    LateDevice(engine)
    free = serve(engine, requests, ["r"], random.Random(0))[0]
    engine.stats()
    seen = []
    runner, sampled = engine._runner, engine._runner._sampled

    def shown(*args):
        seen.extend(args[0].sampling.position.tolist())
        return sampled(*args)

    engine.clear_prefix_cache()
    engine.observe_logits(lambda *_: None)
    runner._sampled = shown
    assert fingerprint(serve(engine, requests, ["r"], random.Random(0))[0]) == fingerprint(free)
    assert seen == list(range(3, 3 + len(free.token_ids)))
    assert engine.stats()["rollout/async_ratio"] == 0
    engine.observe_logits(None)
    engine.add_request(*requests["r"], "r")
    samples, index = [], 0
    while engine.has_unfinished:
        engine.observe_logits((lambda *_: None) if index % 3 == 0 else None)
        samples += engine.step()
        index += 1
    assert [fingerprint(sample) for sample in samples] == [fingerprint(free)]
    assert 0 < engine.stats()["rollout/async_ratio"] < 1


def test_a_page_is_found_by_the_tokens_that_were_sampled():
    """Position 3 fills the first page in a step that is launched before anybody knows the token that is there."""
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    engine = make(page_size=4, **AHEAD)
    LateDevice(engine)
    (sample,) = engine.generate([[1, 2, 3]], params, ["r"])
    engine.stats()
    for token, hits in ((sample.token_ids[0], 4), (0, 0)):
        engine.generate([[1, 2, 3, token, 9]], params, [f"then {token}"])
        assert engine.take_stats().num_prefix_hits == hits


def test_a_step_that_cannot_be_launched_loses_no_token(expected):
    """Those of the step before are still on their way, and the step may be tried again."""
    requests = workload()
    engine = make(page_size=4, **AHEAD)
    LateDevice(engine)
    launch, calls = engine._runner.execute, []

    def starved(inputs):
        calls.append(None)
        if len(calls) % 3 == 0:
            raise MemoryError
        return launch(inputs)

    engine._runner.execute = starved
    for name in ("r2", "r3", "r5"):
        engine.add_request(*requests[name], name)
    samples = []
    while engine.has_unfinished:
        try:
            samples += engine.step()
        except MemoryError:
            continue
    engine.check_idle()
    assert len(calls) > 12
    for sample in samples:
        assert fingerprint(sample) == fingerprint(expected[0][sample.request_id])


def test_tokens_that_an_interrupt_loses_are_missed(monkeypatch):
    """They are not taken for those of the next step, and no page is shared under what they might have been."""
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    (expected,) = make(**SYNC).generate([[1, 2, 3]], params, ["r"])
    engine = make(page_size=4, **AHEAD)
    engine.add_request([1, 2, 3], params, "r")
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(PendingOutput, "wait", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="tokens are lost: abort"):
            engine.step()
    assert engine.abort_all() == ["r"]
    engine.check_idle()
    engine.stats()
    assert fingerprint(engine.generate([[1, 2, 3]], params, ["r"])[0]) == fingerprint(expected)
    engine.generate([[1, 2, 3, 0, 9]], params)
    assert engine.take_stats().num_prefix_hits == 0


def _interrupted(self):
    raise KeyboardInterrupt


def test_a_model_with_experts_runs_ahead():
    """A real one, whose rows bring the digests of their experts along."""
    model = random_model(ModelConfig.from_hf_dict(MOONLIGHT), 0)
    found = []
    for mode in (SYNC, AHEAD):
        engine = Engine(model=model, max_model_len=64, page_size=4, eos_token_ids=range(0, 61, 9), **mode)
        samples = engine.generate([[1, 2, 3], [4, 5]], SamplingParams(n=2, max_tokens=9), ["a", "b"])
        found.append([(one.token_ids, bits(one.logprobs), one.route_digests.tolist()) for one in samples])
        assert (engine.stats()["rollout/async_ratio"] > 0.5) == (mode is AHEAD)
    assert found[0] == found[1]


def _give_away_too_early(monkeypatch):
    """Pages of a request go to others in the very step that still computes its last token."""
    admit = Scheduler._admit

    def early(self, running):
        for slot in running.slots.tolist():
            request = self._state.request(slot)
            if self._state.num_tokens[slot] + 1 == request.max_total_tokens:
                self._blocks.release(request.pages)
                request.pages.clear()
        return admit(self, running)

    monkeypatch.setattr(Scheduler, "_admit", early)


def _forget_who_was_there(monkeypatch):
    """A token that was on its way to a request that has left goes to the next one in its slot."""
    unbind = SlotState.unbind

    def forgetful(self, request):
        slot = request.slot
        unbind(self, request)
        self.tenancy[slot] -= 1

    monkeypatch.setattr(SlotState, "unbind", forgetful)


@pytest.mark.parametrize(
    ("fault", "audited"), [(_give_away_too_early, True), (_give_away_too_early, False), (_forget_who_was_there, False)]
)
def test_the_comparison_finds_a_planted_fault(expected, monkeypatch, fault, audited):
    """The bits alone find it; the auditor finds a page in wrong hands before it shows in them."""
    requests = workload()
    fault(monkeypatch)
    found = 0
    for case in range(12):
        rng = random.Random(case)
        engine = make(page_size=2, num_pages=60, max_num_seqs=4, enable_prefix_caching=True, **AHEAD)
        LateDevice(engine)
        if audited:
            PageAuditor(engine, monkeypatch)
        try:
            samples = serve(engine, requests, rng.sample(sorted(requests), 10), rng, 0.05)
        except (AssertionError, RuntimeError, ValueError, IndexError):
            found += 1
            continue
        whole = [expected[0][sample.request_id] for sample in samples]
        found += any(one.token_ids != two.token_ids[: len(one.token_ids)] for one, two in zip(samples, whole))
    assert found
