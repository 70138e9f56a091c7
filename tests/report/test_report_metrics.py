import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import vexact
from vexact.report import metrics as m
from vexact.report.names import METRICS, describe, render
from vexact.report.timers import Timers
from vexact.types import Prompt, Sample, SampleGroup, Score, TrainSequence


def sample(num_tokens, num_prompt_tokens=3):
    values = np.zeros(num_tokens, np.float32)
    return Sample("r", (1,) * num_prompt_tokens, (5,) * num_tokens, values, values, 1.0, "stop", 0)


def group(*scores, source="add"):
    scores = tuple(score if isinstance(score, Score) else Score(score) for score in scores)
    prompt = Prompt(0, (1, 2), "1+1=", source, "2")
    return SampleGroup(prompt, tuple(sample(2) for _ in scores), scores)


def test_scores_extra_keys_and_flat_groups():
    groups = [group(Score(1.0, {"acc": 1.0}), Score(0.0, status="error")), group(Score(0.5, {"acc": 0.0}), 0.5)]
    assert m.score_metrics(groups) == {
        "critic/score/mean": 0.5,
        "critic/score/max": 1.0,
        "critic/score/min": 0.0,
        "reward/acc/mean": 0.5,
        "reward/frac_zero_std_groups": 0.5,
    }
    assert m.score_metrics([]) == {}


def test_no_key_of_a_grader_takes_the_place_of_another_metric():
    """The seconds that grading took are `reward/time_s/mean`, and a validation's score is `reward`."""
    groups = [group(Score(1.0, {"time_s": 40.0, "reward": 3.0, "mean": 5.0}))]
    assert m.score_metrics(groups) == {
        "critic/score/mean": 1.0,
        "critic/score/max": 1.0,
        "critic/score/min": 1.0,
        "reward/extra_time_s/mean": 40.0,
        "reward/reward/mean": 3.0,
        "reward/mean/mean": 5.0,
        "reward/frac_zero_std_groups": 1.0,
    }
    assert m.validation_metrics(groups) == {
        "val-core/add/reward/mean@1": 1.0,
        "val-aux/add/extra_reward/mean@1": 3.0,
        "val-aux/add/time_s/mean@1": 40.0,
        "val-aux/add/mean/mean@1": 5.0,
    }


def test_advantages_are_per_token():
    sequences = [
        TrainSequence(sample(1), np.array([2.0], np.float32)),
        TrainSequence(sample(3), np.array([-1.0, -1.0, -1.0], np.float32)),
    ]
    found = m.advantage_metrics(sequences)
    assert (found["critic/advantages/mean"], found["critic/advantages/min"]) == (-0.25, -1.0)


def test_lengths_and_clip_ratio():
    found = m.length_metrics([sample(4, 2), sample(8, 3)], max_prompt_length=3, max_response_length=8)
    assert found["response_length/mean"] == 6.0
    assert found["response_length/clip_ratio"] == 0.5
    assert found["prompt_length/max"] == 3.0
    assert found["prompt_length/clip_ratio"] == 0.5


def test_throughput_is_per_gpu():
    assert m.perf_metrics(1000, 2.0, num_gpus=4) == {
        "perf/total_num_tokens": 1000.0,
        "perf/time_per_step": 2.0,
        "perf/throughput": 125.0,
    }


def test_validation_names_and_weights():
    def acc(value, **kwargs):
        return Score(value, {"acc": value, "format": 1.0}, **kwargs)

    groups = [
        group(acc(1.0), acc(0.0), source="a"),
        group(acc(1.0), Score(0.0, status="timeout"), source="a"),
        group(1.0, 0.0, source="b"),
    ]
    assert m.validation_metrics(groups) == {
        "val-core/a/acc/mean@2": 0.5,
        "val-aux/a/reward/mean@2": 0.5,
        "val-aux/a/format/mean@2": 0.75,
        "val-core/b/reward/mean@2": 0.5,
    }


def test_timers_add_up_and_announce(monkeypatch):
    heard = []
    monkeypatch.setattr("vexact.report.timers.time", SimpleNamespace(perf_counter=itertools.count().__next__))
    timers = Timers(on_enter=heard.append)
    for name in ("gen", "reward", "gen"):
        with timers(name):
            pass
    with pytest.raises(KeyError), timers("failing"):
        raise KeyError
    taken = timers.take()
    assert taken == {"timing_s/gen": 2, "timing_s/reward": 1, "timing_s/failing": 1}
    assert list(taken) == ["timing_s/gen", "timing_s/reward", "timing_s/failing"]
    assert heard == ["gen", "reward", "gen", "failing"]
    assert timers.take() == {}


def test_every_name_of_this_package_is_described():
    names = (
        set(m.score_metrics([group(Score(1.0, {"acc": 1.0}))]))
        | set(m.length_metrics([sample(1)], 1, 1))
        | set(m.perf_metrics(1, 1.0))
        | set(m.validation_metrics([group(1.0)]))
        | {"timing_s/gen", "reward/time_s/max", "critic/rewards/mean", "training/rollout_probs_diff_std"}
    )
    assert {name for name in names if describe(name) is None} == set()
    assert describe("timing_s/reward") == "Seconds grading."
    assert describe("reward/acc/mean") == METRICS["Reward"]["reward/<key>/mean"]
    assert describe("nothing/like/it") is None


def test_the_metrics_page_is_up_to_date():
    page = Path(vexact.__file__).parents[1] / "docs" / "metrics.md"
    assert page.read_text() == render(), "run: python -m vexact.report.names > docs/metrics.md"
