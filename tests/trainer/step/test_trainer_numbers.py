"""Scores and advantages reach the loss as they were computed; updates without numbers do not pass for training."""

import dataclasses
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vexact.audit import ExactnessError
from vexact.config import load_config
from vexact.reward.pool import RewardPool
from vexact.reward.run import Run
from vexact.reward.seal import SealError, require_seals, sample_key, seal
from vexact.reward.spec import RewardError, RewardSpec
from vexact.trainer.checkpoint import CheckpointError, load_checkpoint
from vexact.trainer.launch import run
from vexact.trainer.step import advantages, collect
from vexact.trainer.step.update_health import UpdateError, UpdateHealth
from vexact.trainer.workers import build as workers_module
from vexact.training import Actor, LedgerError
from vexact.training import actor as actor_module
from vexact.training.optim.optimizer import Optimizer
from vexact.types import Prompt, Sample, SampleGroup, Score


def _change_first(scores, change):
    return [change(scores[0]), *scores[1:]]


SCORES = {
    "rotated": lambda scores: scores[1:] + scores[:1],
    "reversed": lambda scores: scores[::-1],
    "sign": lambda scores: [dataclasses.replace(score, value=-1 - score.value) for score in scores],
    "one ulp": lambda scores: _change_first(scores, lambda s: dataclasses.replace(s, value=s.value + 2**-50)),
    "dropped": lambda scores: scores[:-1],
    "made up": lambda scores: _change_first(scores, lambda s: Score(s.value)),
}


@pytest.fixture
def inline(overrides, monkeypatch):
    """A configuration whose run grades in this process: starting a worker takes longer than the rest."""

    def start_rewards(config):
        custom = config.reward.custom_reward_function
        return RewardPool(0, RewardSpec(custom.path, custom.name))

    monkeypatch.setattr(workers_module, "start_rewards", start_rewards)
    return lambda *more: load_config(overrides("trainer.total_training_steps=2", *more))


@pytest.fixture
def groups(inline):
    """Four groups of four made-up samples, the rewards that grade them, and the configuration."""
    config = inline()
    prompts = [Prompt(row, (1, 2), "", "sum", "7") for row in range(4)]
    made = [SampleGroup(p, tuple(_sample(f"row{p.row}/{i}", f"{p.row}{i}") for i in range(4))) for p in prompts]
    workers = SimpleNamespace(rewards=workers_module.start_rewards(config))
    return config, workers, made


def _sample(name, text="12"):
    zeros = np.zeros(2, np.float32)
    return Sample(name, (1,), tuple(text.encode()[:2]), zeros, zeros, 1.0, "length", 0, text=text)


@pytest.mark.parametrize("change", SCORES.values(), ids=SCORES.keys())
def test_scores_that_come_back_wrong_are_found(groups, change):
    _, workers, made = groups
    score = workers.rewards.score
    workers.rewards.score = lambda requests: change(score(requests))
    with pytest.raises(SealError, match=r"request row\d/\d: its score|15 scores came back for 16 samples"):
        collect.score_groups(workers, made)


@pytest.mark.parametrize("change", SCORES.values(), ids=SCORES.keys())
def test_scores_that_go_wrong_later_are_found(groups, change):
    config, workers, made = groups
    scored = collect.score_groups(workers, made)
    sequences, _, _ = advantages.train_sequences(config, scored, None)
    assert len(sequences) == 16
    wrong = [dataclasses.replace(group, scores=tuple(change(list(group.scores)))) for group in scored]
    with pytest.raises(SealError, match=r"request row\d/\d: its score|12 scores came back for 16 samples"):
        advantages.train_sequences(config, wrong, None)
    others = [dataclasses.replace(g, scores=o.scores) for g, o in zip(scored, scored[1:] + scored[:1], strict=True)]
    with pytest.raises(SealError, match=r"request row0/0: its score .* was given for request row1/0"):
        advantages.train_sequences(config, others, None)


def test_a_rotated_score_stops_a_run(inline, tmp_path, monkeypatch):
    score = RewardPool.score

    def rotated(self, requests):
        scores = score(self, requests)
        return scores[1:] + scores[:1] if requests[0].key else scores  # the dry run before step 1 has no samples

    monkeypatch.setattr(RewardPool, "score", rotated)
    with pytest.raises(SealError, match=r"request step1-\d-row\d+/\d: its score"):
        run(inline())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_owner_of_a_misplaced_score_is_named():
    samples = [_sample(name) for name in ("a/0", "a/1", "b/0")]
    scores = [Score(v, seal=seal(sample_key(s), v)) for s, v in zip(samples, (0.5, 1.0, 0.25), strict=True)]
    require_seals(samples, scores)
    with pytest.raises(SealError, match=r"request a/0: its score 1\.0 was given for request a/1"):
        require_seals(samples, [scores[1], scores[0], scores[2]])
    shorter = dataclasses.replace(samples[0], token_ids=samples[0].token_ids[:-1])
    with pytest.raises(SealError, match=r"request a/0: its score 0\.5 was changed after grading"):
        require_seals([shorter, *samples[1:]], scores)


def test_a_worker_that_answers_for_another_sample_is_found(overrides, monkeypatch):
    outcomes = Run.outcomes
    monkeypatch.setattr(Run, "outcomes", lambda self: outcomes(self)[1:] + outcomes(self)[:1])
    with pytest.raises(RewardError, match="answered for other samples"):
        run(load_config(overrides()))


def _swap(sequences):
    first, second = sequences[0], next(s for s in sequences[1:] if s.advantages[0] != sequences[0].advantages[0])
    n = min(len(first.advantages), len(second.advantages))
    a, b = first.advantages.copy(), second.advantages.copy()
    a[:n], b[:n] = second.advantages[:n], first.advantages[:n]
    changed = {first: dataclasses.replace(first, advantages=a), second: dataclasses.replace(second, advantages=b)}
    return [changed.get(s, s) for s in sequences]


ADVANTAGES = {
    "swapped": _swap,
    "flipped": lambda sequences: [dataclasses.replace(s, advantages=-s.advantages) for s in sequences],
    "dropped": lambda sequences: sequences[:-1],
    "rotated": lambda sequences: sequences[1:] + sequences[:1],
}


@pytest.mark.parametrize("change", ADVANTAGES.values(), ids=ADVANTAGES.keys())
def test_advantages_mixed_up_on_the_way_to_the_actor_stop_the_run(inline, tmp_path, monkeypatch, change):
    update = Actor.update
    monkeypatch.setattr(
        Actor, "update", lambda self, sequences, *args, **kwargs: update(self, change(sequences), *args, **kwargs)
    )
    with pytest.raises(LedgerError, match=r"step1-\d-row\d+/\d"):
        run(inline())
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("value", [1e39, -1e300])
def test_a_score_that_float32_cannot_hold_names_its_request(groups, value):
    config, workers, made = groups
    score = workers.rewards.score
    workers.rewards.score = lambda requests: [
        dataclasses.replace(s, value=value, seal=seal(r.key, value))
        for r, s in zip(requests, score(requests), strict=True)
    ]
    with pytest.raises(ValueError, match=r"request row0/0: its score -?1e\+\d+ is no finite float32 number"):
        advantages.train_sequences(config, collect.score_groups(workers, made), None)


def test_an_advantage_that_is_no_number_names_request_and_scores(groups, monkeypatch):
    config, workers, made = groups
    estimator = advantages.advantage_estimator
    monkeypatch.setattr(advantages, "advantage_estimator", lambda name: lambda *a: estimator(name)(*a) * float("nan"))
    with pytest.raises(ValueError, match=r"request row0/0: its advantage is nan, from the scores 0, 0\.5, 0, 0\.5"):
        advantages.train_sequences(config, collect.score_groups(workers, made), None)


def test_a_reference_without_numbers_names_request_and_token(groups):
    config, workers, made = groups
    broken = SimpleNamespace(logprobs=lambda sequences: [np.float32([-1.0, np.nan]) for _ in sequences])
    with pytest.raises(ValueError, match=r"request row0/0, response position 1: the reference .* token 48 .* nan"):
        advantages.train_sequences(config, collect.score_groups(workers, made), broken)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_the_kl_of_a_reward_is_reported_as_it_is(groups, coefficient):
    """Mean over samples of the mean per token, as in verl, whatever its coefficient."""
    config, workers, made = groups
    control = dataclasses.replace(config.algorithm.kl_ctrl, kl_coef=coefficient)
    config = dataclasses.replace(
        config, algorithm=dataclasses.replace(config.algorithm, use_kl_in_reward=True, kl_ctrl=control)
    )
    long, short = _sample("row0/0", "12"), _sample("row0/1", "1")
    short = dataclasses.replace(short, logprobs=np.zeros(1, np.float32), min_logits=np.zeros(1, np.float32))
    pair = [SampleGroup(made[0].prompt, (long, short))]
    reference = SimpleNamespace(logprobs=lambda _: [np.float32([-1, -3]), np.float32([-8])])
    scored = collect.score_groups(workers, pair)
    _, _, found = advantages.train_sequences(config, scored, reference)
    assert found["actor/reward_kl_penalty"] == ((1 + 3) / 2 + 8) / 2
    assert found["actor/reward_kl_penalty_coeff"] == coefficient
    score = [score.value for score in scored[0].scores]
    kl = coefficient * np.array([1 + 3, 8])
    assert found["critic/rewards/mean"] == pytest.approx(np.mean(score - kl))


def _skip(monkeypatch, steps):
    step, seen = Optimizer.step, iter(range(1, 1000))

    def poisoned(self, max_norm):
        if next(seen) in steps:
            self.parameters[0].grad.view(-1)[0] = float("nan")
        return step(self, max_norm)

    monkeypatch.setattr(Optimizer, "step", poisoned)


@pytest.mark.parametrize(
    ("allowed", "skipped", "fails_at"),
    [(0, {1}, 1), (1, {1, 2}, 2), (1, {2}, None)],
)
def test_skipped_updates_stop_a_strict_run(inline, metrics, monkeypatch, caplog, allowed, skipped, fails_at):
    _skip(monkeypatch, skipped)
    config = inline(f"trainer.max_skipped_updates={allowed}")
    if fails_at is None:
        assert run(config) == 0
        assert caplog.text.count("optimizer steps of this update were skipped") == 1, "warned about once"
        assert {row["step"] for row in metrics() if row["actor/skipped_steps"]} == skipped
    else:
        message = (
            rf"skipped, {allowed + 1} in a row.*embed_tokens.weight holds 1 non-finite number.*max_skipped_updates"
        )
        with pytest.raises(UpdateError, match=message):
            run(config)
        assert metrics()[-1]["step"] == fails_at
        assert metrics()[-1]["actor/skipped_steps"] == 1


def test_other_modes_count_and_warn_once(inline, metrics, monkeypatch, caplog):
    _skip(monkeypatch, {1, 2})
    assert run(inline("trainer.exactness=off", "trainer.max_skipped_updates=0")) == 0
    assert [row["actor/skipped_in_a_row"] for row in metrics() if "actor/skipped_in_a_row" in row] == [1, 2]
    assert caplog.text.count("optimizer steps of this update were skipped") == 1


@pytest.mark.parametrize("exactness", ["strict", "warn"])
def test_weights_that_an_update_breaks_never_replace_a_checkpoint(inline, metrics, monkeypatch, tmp_path, exactness):
    more = (f"trainer.exactness={exactness}", "trainer.save_freq=1", "trainer.keep_last=1")
    step, seen = Optimizer.step, iter(range(1, 1000))

    def breaking(self, max_norm):
        norm = step(self, max_norm)
        if next(seen) == 2:
            with torch.no_grad():
                self.parameters[1].view(-1)[3] = float("inf")
        return norm

    monkeypatch.setattr(Optimizer, "step", breaking)
    if exactness == "strict":
        with pytest.raises(UpdateError, match=r"not finite after this update: layers\.0\.\S+ holds 1 non-finite"):
            run(inline(*more))
    else:
        with pytest.raises(CheckpointError, match=r"step 2 is not saved: layers\.0\.\S+ holds 1 non-finite"):
            run(inline(*more))
    assert metrics()[-1]["actor/nonfinite_tensors"] >= 1
    store = tmp_path / "run" / "checkpoints"
    assert [path.name for path in store.iterdir()] == ["step_1"]
    assert (tmp_path / "run" / "latest").read_text().strip().endswith("step_1")
    assert load_checkpoint(store / "step_1")[0].step == 1


def test_health_names_what_it_saw_once_per_kind(caplog):
    caplog.set_level(logging.WARNING)
    health = UpdateHealth("warn", 0)
    broken = {"actor/nonfinite_tensors": 2.0, "actor/skipped_steps": 0.0, "actor/skipped_in_a_row": 0.0}
    skipped = {"actor/nonfinite_tensors": 0.0, "actor/skipped_steps": 1.0, "actor/skipped_in_a_row": 1.0}
    for _ in range(2):
        health.check(broken, ["norm.weight holds 1"])
        health.check(skipped, ["the loss was nan"])
    assert (caplog.text.count("norm.weight holds 1"), caplog.text.count("the loss was nan")) == (1, 1)


def test_gpus_that_wait_for_others_in_an_update_are_told_of_once(caplog):
    caplog.set_level(logging.WARNING)
    health = UpdateHealth("strict", 0)
    fine = {"actor/nonfinite_tensors": 0.0, "actor/skipped_steps": 0.0, "actor/skipped_in_a_row": 0.0}
    for share in ({}, {"perf/idle_share/actor": 0.2}, {"perf/idle_share/actor": 0.375}, {"perf/idle_share/actor": 0.5}):
        health.check(fine | share, [])
    assert len(caplog.records) == 1
    assert "in the update 38 % of what the training processes could compute is waiting" in caplog.text
    assert "lower actor_rollout_ref.actor.ppo_max_token_len_per_gpu" in caplog.text


def test_a_training_forward_without_numbers_stops_at_the_audit_and_says_why(inline, metrics, monkeypatch):
    by_sequence = actor_module.by_sequence

    def broken(*args):
        scored = by_sequence(*args)
        scored.logprobs[0][1] = np.nan
        return scored

    monkeypatch.setattr(actor_module, "by_sequence", broken)
    message = r"no finite value \(1\).*position 1, token \d+, rollout -[\d.]+, trainer nan[^\n]*\nEvery weight is"
    with pytest.raises(ExactnessError, match=message):
        run(inline())
    assert metrics()[-1]["bitwise/tokens_nonfinite"] == 1
