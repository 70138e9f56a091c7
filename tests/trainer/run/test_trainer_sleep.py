"""A rollout that gives its weights' memory back for every update: the run keeps every bit, whatever else it does."""

import pytest
import rank_runs
import torch
from planted_fault import Fault
from run_results import digest, rows, samples
from small_run import small_run, write_model

from vexact.audit import ExactnessError
from vexact.config import load_config
from vexact.rollout import Engine
from vexact.trainer.launch import run
from vexact.trainer.step.collect import Collector
from vexact.training import Actor

SLEEP = "actor_rollout_ref.rollout.enable_sleep_mode=true"
STEPS = 3
MORE = (
    f"trainer.total_training_steps={STEPS}",
    "trainer.logger=[jsonl]",
    "trainer.samples_per_step=-1",
    "trainer.save_freq=1",
    "trainer.test_freq=1",
    "trainer.val_before_train=true",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2",
    "actor_rollout_ref.actor.use_kl_loss=true",
    "algorithm.recompute_old_log_prob=true",
)
COMPARED = ("critic/", "actor/loss", "actor/grad_norm", "actor/kl", "bitwise/", "response_length/", "val-")


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory):
    def make(name, *more):
        return [*small_run(tiny, tmp_path_factory.getbasetemp() / "sleep" / name), *MORE, *more]

    make("plain")
    return lambda name, *more: [*make(name, *more), f"data.val_files={tiny / 'test.jsonl'}"]


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory):
    assert run(load_config(arguments("plain"))) == 0
    return tmp_path_factory.getbasetemp() / "sleep" / "plain"


@pytest.fixture
def calls(monkeypatch):
    """What the engine and the actor did, in order; while the actor computes, the weights must be away."""
    seen, engines = [], []

    def note(owner, name, label):
        original = getattr(owner, name)

        def noting(self, *args, **kwargs):
            if owner is Engine:
                engines[:] = [self]
            if owner is Actor:
                assert engines[0].weights.released, label
            seen.append(label)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, noting)

    note(Engine, "generate", "generate")
    note(Engine, "release_weights", "release")
    note(Engine, "replacing_weights", "sync")
    note(Actor, "score", "score")
    note(Actor, "update", "update")
    note(Actor, "load_state_dict", "restore")
    return seen


def equal(directory, plain):
    assert samples(directory, STEPS) == samples(plain, STEPS)
    assert digest(directory, STEPS) == digest(plain, STEPS)
    for row, expected in zip(rows(directory), rows(plain), strict=True):
        same = {key for key in expected if key.startswith(COMPARED)}
        assert {key: row[key] for key in same} == {key: expected[key] for key in same}
        assert not row.get("bitwise/tokens_different", 0)


def test_the_run_is_the_run_without(arguments, plain, calls, tmp_path_factory):
    assert run(load_config(arguments("asleep", SLEEP))) == 0
    equal(tmp_path_factory.getbasetemp() / "sleep" / "asleep", plain)
    start = ["release", "sync", "generate", "generate", "release", "score", "sync"]  # validation, self-test
    step = ["generate", "release", "score", "update", "sync", "generate"]  # with validation
    assert calls == start + step * STEPS


def test_a_resumed_run_and_a_validation_alone(arguments, plain, calls, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "sleep" / "resumed"
    assert run(load_config(arguments("resumed", SLEEP, "trainer.total_training_steps=1"))) == 0
    del calls[:]
    assert run(load_config(arguments("resumed", SLEEP, "trainer.resume_changed=allow"))) == 0
    assert calls[:5] == ["release", "sync", "generate", "release", "score"]
    assert samples(directory, STEPS) == samples(plain, STEPS)
    assert digest(directory, STEPS) == digest(plain, STEPS)
    del calls[:]
    assert run(load_config(arguments("resumed", SLEEP, "trainer.val_only=true"))) == 0
    assert calls == ["release", "sync", "generate"]


def test_ranks_that_share_experts_wake_with_their_routers(arguments, tmp_path, tmp_path_factory):
    """A mixture with an untied head and all that can be offloaded, against one process that never sleeps."""
    write_model(
        tmp_path / "model",
        architectures=["Qwen3MoeForCausalLM"],
        model_type="qwen3_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )
    fsdp = "actor_rollout_ref.actor.fsdp_config"
    more = (
        f"actor_rollout_ref.model.path={tmp_path / 'model'}",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
        f"{fsdp}.dtype=bfloat16",
        "actor_rollout_ref.rollout.dtype=bfloat16",
    )
    offload = (f"{fsdp}.param_offload=true", f"{fsdp}.optimizer_offload=true", f"{fsdp}.expert_parallel_size=2")
    ranks = rank_runs.start(tmp_path / "logs", arguments("two_ranks", SLEEP, *more, *offload))
    assert run(load_config(arguments("one_rank", *more))) == 0
    assert ranks.wait() == [0, 0], ranks.output()
    base = tmp_path_factory.getbasetemp() / "sleep"
    equal(base / "two_ranks", base / "one_rank")
    assert all(row["bitwise/routes_different"] == 0 for row in rows(base / "two_ranks") if "actor/loss" in row)


def test_a_rank_whose_weights_had_changed_is_told_though_it_slept(arguments, tmp_path):
    fault = Fault("generation", "weight", version=1, call=1)
    ranks = rank_runs.start(tmp_path / "logs", arguments("fault", SLEEP), fault=fault)
    assert rank_runs.was_refused(ranks.wait()), ranks.output()
    assert "tensor embed_tokens.weight was another when it sampled" in ranks.output()
    assert "generated by rank 1 and trained on by rank " in ranks.output()
    assert ranks.left() == []


def test_a_divergence_is_found_though_the_rollout_slept(arguments, monkeypatch, tmp_path_factory):
    """An operator that differs is named as ever; a weight that had been changed, though it is gone."""
    collect = Collector.collect

    def changed(self, *args):
        with torch.no_grad():
            self.workers.engine.model.norm.weight[3] += 0.5
        return collect(self, *args)

    monkeypatch.setattr(Collector, "collect", changed)
    with pytest.raises(ExactnessError, match=r"tensor norm\.weight was another when it sampled") as caught:
        run(load_config(arguments("changed", SLEEP)))
    message = str(caught.value)
    assert " tensors differed: norm.weight\n" in message
    assert "the rollout's weights were given back for the update" in message
    assert (tmp_path_factory.getbasetemp() / "sleep" / "changed" / "divergence.pt").is_file()


def test_settings_that_leave_nothing_to_give_back_are_refused(arguments):
    for more, words in {
        "trainer.rollout_gpus=1": "nothing trains on the GPUs that sample",
        "actor_rollout_ref.rollout.free_cache_engine=false": "gives the key-value cache's memory as well",
    }.items():
        with pytest.raises(ValueError, match="enable_sleep_mode=true") as caught:
            load_config(arguments("refused", SLEEP, more))
        assert words in str(caught.value)
