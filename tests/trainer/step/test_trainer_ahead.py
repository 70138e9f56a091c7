"""What generates one step ahead, without a run: the samples it stores, its errors, and the weights that are kept."""

from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vexact.audit import Audit
from vexact.report import Timers
from vexact.trainer.ahead import Ahead, PastAudit, StaleSamplesError, read_collected, write_collected
from vexact.trainer.checkpoint import CheckpointError, manifest
from vexact.trainer.step.collect import Collected
from vexact.training.optim.host_memory import host_rows
from vexact.training.state import past_weights
from vexact.training.state.past_weights import PastWeights
from vexact.types import Prompt, Sample, SampleGroup, Score


def prompt(row: int) -> Prompt:
    return Prompt(row, (5, 6 + row), f"prompt {row}", "sum", "1")


def group(row: int, version: int, step: int = 3) -> SampleGroup:
    drawn = [
        Sample(
            request_id=f"step{step}-{row}-row{row}/{i}",
            prompt_token_ids=prompt(row).token_ids,
            token_ids=tuple(range(row, row + length)),
            logprobs=np.linspace(-3, -0.1, length, dtype=np.float32),
            min_logits=np.full(length, -np.inf, np.float32),
            temperature=0.7,
            finish_reason="stop",
            weights_version=version,
            stop_reason=stop,
            text="\udc80 é",
            route_digests=np.arange(length) - 2**62 + row,
        )
        for i, (length, stop) in enumerate([(4, None), (1, 7), (9, "end")])
    ]
    scores = (Score(1 / 3, {"odd": 1.0}, seal="x"), Score(0.0, status="error", message="no"), Score(-2.5))
    return SampleGroup(prompt(row), tuple(drawn), scores)


def collected(version: int = 1) -> Collected:
    groups = [group(row, version) for row in range(3)]
    return Collected([groups[2], groups[0]], groups, 12, {"rollout/num_tokens": 1 / 3})


def stored(path: Path, step: int = 3) -> Path:
    path.mkdir()
    write_collected(path, step, collected())
    with manifest.Digests(path) as digests:
        manifest.write_manifest(path, step - 1, digests.entries())
    return path


def test_stored_samples_are_the_samples(tmp_path):
    found, given = read_collected(stored(tmp_path / "c"), 3, [prompt(row) for row in range(3)]), collected()
    assert found is not None
    assert (found.cursor, found.metrics) == (given.cursor, given.metrics)
    assert [one.prompt.row for one in found.groups] == [2, 0]
    assert found.groups[0] is found.sampled[2]
    for ours, theirs in zip(found.sampled, given.sampled, strict=True):
        assert (ours.prompt, ours.scores) == (theirs.prompt, theirs.scores)
        for one, other in zip(ours.samples, theirs.samples, strict=True):
            for name in Sample.__slots__:
                a, b = getattr(one, name), getattr(other, name)
                same = a.dtype == b.dtype and a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else a == b
                assert same, name
                assert type(a) is type(b), name


def test_stored_samples_that_do_not_fit_are_refused(tmp_path):
    rows = [prompt(row) for row in range(3)]
    path = stored(tmp_path / "c")
    with pytest.raises(CheckpointError, match="it is of step 3, expected step 4"):
        read_collected(path, 4, rows)
    with pytest.raises(CheckpointError, match=r"row 1 of data\.train_files is another prompt"):
        read_collected(path, 3, [prompt(row) for row in (1, 1, 2)])
    text = path / "next_step" / "samples.json"
    text.write_text(text.read_text().replace('"groups"', '"group"'))
    with pytest.raises(CheckpointError, match="lacks 'groups'"):
        read_collected(path, 3, rows)
    (path / "next_step" / "numbers.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"samples\.json holds no samples"):
        read_collected(path, 3, rows)
    without = tmp_path / "without"
    without.mkdir()
    assert read_collected(without, 3, rows) is None
    manifest.write_manifest(without, 2, {})
    (without / "next_step").mkdir()
    (without / "next_step" / "samples.json").write_text("{}")
    assert read_collected(without, 3, rows) is None, "a file that the manifest does not know was put there"


class StubCollector:
    def __init__(self, result):
        self.result, self.begun = result, []

    def begin(self, step, cursor):
        self.begun.append((step, cursor))

    def collect(self, step, cursor):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_what_goes_wrong_ahead_is_raised_in_its_own_step():
    collector = StubCollector(ValueError("no such key"))
    ahead = Ahead(collector, 1, 9, (2, collected(1)))
    assert len(ahead.take(2, 0).groups) == 2
    ahead.begin(3, 12)
    ahead.finish()  # step 2 is reported and saved after this
    with pytest.raises(ValueError, match="no such key"):
        ahead.take(3, 12)


def test_only_the_version_before_is_trained_on_and_the_last_step_generates_nothing_ahead(tmp_path):
    metrics = {"rollout/num_tokens": 30.0, "rollout/decode_tokens_per_s": 60.0}
    collector = StubCollector(collected(1)._replace(metrics=metrics))
    ahead = Ahead(collector, 1, 3, None)
    ahead.begin(3, 12)
    ahead.finish()
    assert ahead.take(3, 12).metrics == metrics | {"timing_s/gen_ahead": 0.5}
    ahead.begin(4, 24)
    assert collector.begun == [(3, 12)]
    ahead.save(tmp_path)
    assert not list(tmp_path.iterdir())
    for depth, step in ((1, 4), (1, 1), (0, 3)):
        with pytest.raises(StaleSamplesError, match=f"step {step} trains weights version {step - 1} and got"):
            Ahead(StubCollector(collected(1)), depth, 9, None).take(step, 0)
    mixed = collected(1)._replace(groups=[group(0, 1), group(1, 2)])
    with pytest.raises(StaleSamplesError, match="version 1, 2"):
        Ahead(StubCollector(mixed), 1, 9, None).take(3, 0)


@pytest.mark.parametrize(
    ("every", "first", "exactness", "due"),
    [
        (3, 1, "strict", [1, 4, 7]),
        (1, 1, "warn", [1, 2, 3, 4, 5, 6, 7, 8]),
        (3, 4, "strict", [4, 7]),
        (3, 5, "strict", [5, 7]),
        (-1, 1, "strict", []),
        (3, 1, "off", []),
    ],
)
def test_weights_are_kept_for_the_steps_that_are_compared_and_no_others(every, first, exactness, due):
    settings = SimpleNamespace(async_steps=1, async_audit_freq=every, exactness=exactness)
    past = PastAudit(SimpleNamespace(trainer=settings), None, Audit("off"), Timers(), first)
    assert [step for step in range(1, 9) if past.is_due(step)] == due
    assert [version + 2 for version in range(-1, 7) if past.needs(version)] == due


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_past_weights_are_there_bit_for_bit_and_go_again(device):
    model = nn.Sequential(nn.Linear(500, 300), nn.Linear(300, 2)).to(device)
    past = PastWeights(model, torch.bfloat16)
    seen = []
    for version in range(4):
        seen.append([p.bfloat16() for p in model.parameters()])
        past.advance(version, keep=version != 1)
        for p in model.parameters():
            p.mul_(1.25)
    present = [p.clone() for p in model.parameters()]
    with suppress(KeyboardInterrupt), past.in_place(2):
        assert all(torch.equal(p, old.float()) for p, old in zip(model.parameters(), seen[2], strict=True))
        raise KeyboardInterrupt
    assert all(torch.equal(p, now) for p, now in zip(model.parameters(), present, strict=True))
    for gone in (0, 1):
        with pytest.raises(KeyError), past.in_place(gone):
            pass


def test_versions_that_are_forgotten_leave_their_memory_to_the_next(monkeypatch):
    made = []
    monkeypatch.setattr(past_weights, "host_rows", lambda *given: made.append(host_rows(*given)) or made[-1])
    model = nn.Linear(5, 3)
    past = PastWeights(model, torch.bfloat16)
    for version in range(7):
        past.advance(version, keep=version % 3 != 1)
        with torch.no_grad():
            model.weight.fill_(version)
            if version % 3 != 1:
                with past.in_place(version):
                    assert torch.equal(model.weight, torch.full_like(model.weight, max(0, version - 1))) or not version
                assert (model.weight == version).all()
    assert len(made) == 3, "two versions that are kept, and the weights that step aside"
