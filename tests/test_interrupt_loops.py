"""Every loop that takes time looks at the flag, and leaves what it works on whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import PATIENCE_S

from vexact import interrupt
from vexact.models import CausalLM, ModelConfig, random_model
from vexact.prepare.directory import build_directory
from vexact.prepare.random_weights import write_random_model
from vexact.reward.pool import RewardPool
from vexact.reward.spec import GradeRequest, RewardSpec
from vexact.rollout import Engine, SamplingParams
from vexact.trainer.checkpoint import CheckpointStore, Progress, Saver, ShardWriter
from vexact.training import Actor, ActorConfig, OptimConfig
from vexact.training.sft import SupervisedConfig, supervised_steps
from vexact.types import Sample, TrainSequence

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ModelConfig.from_hf_dict(
    {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
    }
)


class Dropped:
    """Sets the flag as a handler does whose KeyboardInterrupt nobody saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, *_: object) -> None:
        self.monkeypatch.setattr(interrupt, "_requested", True)

    def forget(self) -> None:
        self.monkeypatch.setattr(interrupt, "_requested", False)


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> Dropped:
    return Dropped(monkeypatch)


def model() -> CausalLM:
    return random_model(CONFIG, seed=0)


def sequences(count: int) -> list[TrainSequence]:
    values = [np.zeros(4, np.float32)] * 3
    floor = np.full(4, -np.inf, np.float32)
    samples = [Sample(f"r{i}", (1, 2, i), (3, 4, 5, 6), values[0], floor, 1.0, "length", 0) for i in range(count)]
    return [TrainSequence(sample, np.ones(4, np.float32)) for sample in samples]


def weights(of: CausalLM) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.named_parameters()}


def assert_unchanged(before: dict[str, torch.Tensor], after: CausalLM) -> None:
    assert all(torch.equal(before[name], parameter) for name, parameter in after.named_parameters())


def test_the_engine_stops_at_the_next_step_and_stays_usable(dropped: Dropped) -> None:
    engine, params = Engine(model=model()), SamplingParams(max_tokens=8, ignore_eos=True)
    expected = engine.generate([[1, 2, 3]], params, ["a"])[0].token_ids
    steps = []
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1, 2, 3]], params, ["a"], on_step=lambda *_: steps.append(dropped()))
    assert len(steps) == 1
    engine.check_idle()
    dropped.forget()
    assert engine.generate([[1, 2, 3]], params, ["a"])[0].token_ids == expected


def test_an_update_stops_at_the_next_micro_batch_and_changes_no_weight(
    dropped: Dropped, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ActorConfig(optim=OptimConfig(lr=0.1), ppo_mini_batch_size=4, ppo_max_token_len_per_gpu=8)
    actor = Actor(model(), settings)
    before, forward, count = weights(actor.model), CausalLM.forward, []

    def second(*args: object, **kwargs: object) -> object:
        count.append(0)
        if len(count) == 2:
            dropped()
        return forward(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(CausalLM, "forward", second)
    with pytest.raises(KeyboardInterrupt):
        actor.update(sequences(4))
    assert len(count) == 2
    assert_unchanged(before, actor.model)
    with pytest.raises(KeyboardInterrupt):
        actor.logprobs(sequences(4))
    assert len(count) == 2


def test_a_supervised_warm_up_stops_at_the_next_step(dropped: Dropped) -> None:
    learner = model()
    before = weights(learner)
    dropped()
    with pytest.raises(KeyboardInterrupt):
        supervised_steps(learner, [([1, 2], [3])], 5, SupervisedConfig())
    assert_unchanged(before, learner)


def test_grading_here_stops_at_the_next_sample(dropped: Dropped, tmp_path: Path) -> None:
    (tmp_path / "grader.py").write_text(
        "from pathlib import Path\n"
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    try:\n"
        "        extra_info['drop']()\n"
        "    except BaseException:\n"
        "        pass\n"
        "    return 0.0\n"
    )
    seen: list[int] = []

    def drop() -> None:  # a function, which the copies of a call's arguments have in common
        seen.append(1)
        dropped()

    request = GradeRequest("mine", "text", "truth", {"drop": drop})
    with (
        RewardPool(0, RewardSpec(str(tmp_path / "grader.py"))) as pool,
        pytest.raises(KeyboardInterrupt),
    ):
        pool.score([request] * 5)
    assert seen == [1]


def test_grading_in_processes_stops_and_the_pool_stays_usable(dropped: Dropped) -> None:
    request = GradeRequest("vexact/addition", "3", "3")
    with RewardPool(1) as pool:
        dropped()
        with pytest.raises(KeyboardInterrupt):
            pool.score([request])
        dropped.forget()
        assert [score.value for score in pool.score([request])] == [1.0]


def test_a_checkpoint_is_left_out_whole(dropped: Dropped, tmp_path: Path) -> None:
    state = {f"weight.{name}": p.detach() for name, p in model().named_parameters()}
    state["num_updates"] = torch.tensor(1)
    store = CheckpointStore(tmp_path, None)
    saver = Saver(store, ShardWriter(lambda: state))
    saver.save(Progress(1, 1), CONFIG, lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        saver.save(Progress(2, 2), CONFIG, dropped)
    assert [path.name for path in store.directory.iterdir()] == ["step_1"]
    assert store.latest() == store.directory / "step_1"
    assert (tmp_path / "latest").read_text() == "checkpoints/step_1\n"


def test_a_directory_is_made_whole_or_not_at_all(dropped: Dropped, tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "file").touch()
        dropped()

    with pytest.raises(KeyboardInterrupt):
        build_directory("x", tmp_path / "out", write, {})
    with pytest.raises(KeyboardInterrupt):
        build_directory("y", tmp_path / "out", write_random_model, {"arch": "qwen2.5-0.5b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_prepare_ends_soon_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "vexact", "prepare", "tiny", "--out", str(tmp_path / "made"), "right_steps=100000"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stderr.readline().startswith("preparing tiny")
    time.sleep(0.3 if number == signal.SIGINT else 2.5)  # while importing, and in the warm-up
    process.send_signal(number)
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 130, errors
    assert errors.endswith(f"\ninterrupted; {tmp_path / 'made'} is not made; the same command makes it\n")
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []
