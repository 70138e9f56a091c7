"""A run with experts and latent attention: exact in bits and routes, and the same run after a break."""

import json

import numpy as np
import pytest
import rank_runs
import torch
from moe_configs import MOONLIGHT, QWEN3_MOE
from run_results import digest
from small_run import write_model

from vexact.audit import ExactnessError
from vexact.config import load_config
from vexact.models import load_model
from vexact.prepare.tokenizers import character_tokenizer
from vexact.rollout.scheduling.state import SlotState
from vexact.trainer.launch import run
from vexact.trainer.workers.groups import gathered
from vexact.training.passes.forward import Scored

ACTOR = "actor_rollout_ref.actor"
BALANCED = {
    "qwen3-moe": (f"{ACTOR}.router_aux_loss_coef=0.01",),
    "moonlight": (f"{ACTOR}.router_bias_update_rate=0.01", f"{ACTOR}.ppo_max_token_len_per_gpu=40"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root, changes = tmp_path_factory.mktemp("experts"), {"vocab_size": len(character_tokenizer())}
    changes |= {"num_hidden_layers": 2, "eos_token_id": character_tokenizer().eos_token_id}
    return {
        name: write_model(root / name, **raw | changes)
        for name, raw in {"qwen3-moe": QWEN3_MOE, "moonlight": MOONLIGHT}.items()
    }


@pytest.mark.parametrize("name", BALANCED)
def test_a_run_is_exact_in_bits_and_routes_and_goes_on_after_a_break(name, models, overrides, metrics, tmp_path):
    def arguments(directory, steps):
        more = (*BALANCED[name], "trainer.save_freq=2", f"trainer.total_training_steps={steps}")
        paths = (f"actor_rollout_ref.model.path={models[name]}", f"trainer.default_local_dir={tmp_path / directory}")
        return overrides(*paths, *more, "trainer.resume_mode=auto")

    def train(directory, steps):
        assert run(load_config(arguments(directory, steps))) == 0

    train("run", 3)
    for row in metrics():
        assert row["bitwise/tokens_different"] == row["bitwise/routes_different"] == 0
        assert row["bitwise/routes_compared"] == row["bitwise/tokens_compared"] == row["rollout/num_tokens"] > 16
        assert row["actor/moe_load_max_over_mean"] >= 1
        assert 0 <= row["actor/moe_idle_experts"] < 1
        assert ("actor/router_aux_loss" in row) is (name == "qwen3-moe")
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())["comparison"]
    assert certificate["routes"]["compared"] == certificate["tokens_compared"] > 0
    before, after = (load_model(path) for path in (models[name], tmp_path / "run" / "checkpoints" / "step_3"))
    pairs = dict(before.named_parameters()), dict(after.named_parameters())
    assert all(not torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])
    train("broken", 2)
    train("broken", 3)
    assert digest(tmp_path / "broken", 3) == digest(tmp_path / "run", 3)
    assert metrics("broken")[-1]["bitwise/routes_different"] == 0
    if name == "moonlight":  # two processes, each with half of the experts
        more = f"{ACTOR}.fsdp_config.expert_parallel_size=2", "trainer.logger=[console,jsonl]"
        shared = rank_runs.start(tmp_path, [*arguments("shared", 3), *more])
        assert shared.wait() == [0, 0], shared.output()
        assert "2 groups of training GPUs share the 8 experts of a layer" in shared.output()
        assert digest(tmp_path / "shared", 3) == digest(tmp_path / "run", 3)
        assert [row["bitwise/routes_different"] for row in metrics("shared")] == [0] * 3


def test_experts_that_differ_stop_a_strict_run(models, overrides, metrics, monkeypatch, tmp_path):
    """The engine says other experts than it chose; every log-probability is right."""
    append = SlotState.append_sampled

    def wrong(self, slots, token_ids, logprobs, min_logits, route_digests):
        append(self, slots, token_ids, logprobs, min_logits, route_digests ^ (token_ids == 5))

    monkeypatch.setattr(SlotState, "append_sampled", wrong)
    given = overrides(f"actor_rollout_ref.model.path={models['moonlight']}", "trainer.exactness=warn")
    assert run(load_config(given)) == 0
    rows = metrics()
    assert any(row["bitwise/routes_different"] for row in rows)
    assert not any(row["bitwise/tokens_different"] for row in rows)
    monkeypatch.setattr("vexact.trainer.driver.require_certificate", lambda *args, **kwargs: None)
    directory = f"trainer.default_local_dir={tmp_path / 'strict'}"
    with pytest.raises(ExactnessError, match=r"predicted by rows that went to other experts. First: request step\d+-"):
        run(load_config([*given, "trainer.exactness=strict", directory]))


def test_routes_that_one_rank_does_not_give_are_missing_for_all():
    values = [np.zeros(2, np.float32)], [np.zeros(2, np.int64)]
    both = gathered([Scored([1], *values), Scored([], [], []), Scored([0], *values)])
    assert (both.indices, len(both.routes)) == ([0, 1], 2)
    assert gathered([Scored([0], *values), Scored([1], values[0], None)]).routes is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("router_bias_update_rate=0.01", "router_bias_update_rate=0.01: Qwen3ForCausalLM has no experts to balance"),
        ("fsdp_config.expert_parallel_size=2", "expert_parallel_size=2: Qwen3ForCausalLM has no experts to share"),
    ],
)
def test_what_concerns_experts_is_refused_for_a_dense_model(overrides, setting, said):
    with pytest.raises(ValueError, match=said):
        run(load_config(overrides(f"{ACTOR}.{setting}")))
