import dataclasses
import json

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file

from vexact.audit import DrawError, ExactnessError
from vexact.audit.certificate import CertificateError
from vexact.config import load_config
from vexact.ops import sample as sampler_as_it_is
from vexact.ops import token_logprobs
from vexact.rollout.sampling import sampler as sampler_module
from vexact.trainer import driver as driver_module
from vexact.trainer.launch import run
from vexact.trainer.workers import build as workers_module


def test_a_run_is_exact_on_every_step_and_leaves_its_files(overrides, metrics, tiny, tmp_path):
    more = (
        f"data.val_files={tiny / 'test.jsonl'}",
        "trainer.save_freq=1",
        "trainer.keep_last=2",
        "trainer.test_freq=2",
    )
    assert run(load_config(overrides(*more))) == 0
    steps = [row for row in metrics() if row["step"] > 0]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        assert row["bitwise/tokens_compared"] == row["rollout/num_tokens"] > 16
        assert row["bitwise/tokens_different"] == row["training/rollout_probs_diff_max"] == 0
        assert row["rollout_corr/kl"] == row["rollout_corr/k3_kl"] == row["actor/ppo_kl"] == 0
        assert row["actor/grad_norm"] > 0
        assert row["reward/odd/mean"] > 0
        assert 0 < row["timing_s/audit"] < row["timing_s/update_actor"]
    assert "val-core/sum/reward/mean@1" in steps[1]
    root = tmp_path / "run"
    assert sorted(p.name for p in (root / "checkpoints").iterdir()) == ["step_2", "step_3"]
    assert (root / "latest").read_text() == "checkpoints/step_3\n"
    sample = json.loads((root / "samples" / "step_1.jsonl").read_text().splitlines()[0])
    assert sample.keys() >= {"prompt", "response", "score", "ground_truth", "finish_reason"}
    assert json.loads((root / "environment.json").read_text())["versions"]["torch"]
    before, after = (load_file(p / "model.safetensors") for p in (tiny / "model", root / "checkpoints" / "step_3"))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def test_truncated_sampling_and_several_minibatches_stay_exact(overrides, metrics):
    more = (
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.top_k=9",
        "actor_rollout_ref.rollout.top_p=0.9",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu=40",
        "actor_rollout_ref.rollout.max_num_batched_tokens=7",
        "actor_rollout_ref.rollout.page_size=3",
        "data.train_max_samples=6",
    )
    run(load_config(overrides(*more)))
    assert [row["training/epoch"] for row in metrics()] == [0, 0, 1], "of the first of the rows 0 to 3, 4 to 7, 8 to 11"
    for row in metrics():
        assert row["bitwise/tokens_different"] == 0
        assert 0 < row["bitwise/tokens_compared"] < row["rollout/num_tokens"]


def test_the_stock_baseline_is_caught_and_goes_on(overrides, metrics, tiny, tmp_path):
    long = (
        "data.max_response_length=60",
        "actor_rollout_ref.rollout.batch_invariant=false",
        "trainer.logger=[console,jsonl]",
    )
    run(load_config(overrides(*long)))
    assert len(metrics()) == 3
    assert all(row["bitwise/tokens_different"] > 0 for row in metrics())
    assert all(
        row["rollout_corr/training_ppl"] == pytest.approx(row["rollout_corr/rollout_ppl"], rel=1e-3)
        for row in metrics()
    )


def _linear_that_splits_k_for_few_rows(x, weight, bias=None, *, out_dtype=None):
    """What cuBLAS does: the number of K slices depends on how many rows there are."""
    if x.shape[0] < 64:
        half = x.shape[1] // 2
        out = F.linear(x[:, :half], weight[:, :half]) + F.linear(x[:, half:], weight[:, half:])
    else:
        out = F.linear(x, weight)
    out = out if bias is None else out + bias
    return out.to(out_dtype or x.dtype)


def _plant(engine):
    planted = dataclasses.replace(engine.model.ops, linear=_linear_that_splits_k_for_few_rows)
    for module in engine.model.modules():
        if hasattr(module, "ops"):
            module.ops = planted


def test_a_planted_non_invariant_linear_stops_the_run(overrides, metrics, monkeypatch, tmp_path):
    """Planted after the self-test, so that the audit of the first step has to find it."""
    self_test = driver_module.require_certificate

    def self_test_then_plant(engine, *args, **kwargs):
        self_test(engine, *args, **kwargs)
        _plant(engine)

    monkeypatch.setattr(driver_module, "require_certificate", self_test_then_plant)
    with pytest.raises(ExactnessError, match=r"response position \d+, token \d+, rollout -?[\d.e-]+, trainer"):
        run(load_config(overrides()))
    (row,) = metrics()
    assert row["bitwise/tokens_different"] > 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def _greedy(logits, params):
    drawn = sampler_as_it_is(logits, params)
    best = logits.argmax(-1)
    logprobs = token_logprobs(logits, best, 1 / params.temperature, drawn.min_logit).logprobs
    return drawn._replace(token_ids=best, logprobs=logprobs)


def _other_seed(logits, params):
    return sampler_as_it_is(logits, params._replace(seed=params.seed ^ 1))


def _other_top_k(logits, params):
    return sampler_as_it_is(logits, params._replace(top_k=params.top_k - 1))


@pytest.mark.parametrize("planted", [_greedy, _other_seed, _other_top_k])
def test_a_planted_sampler_whose_log_probabilities_are_true_stops_the_run(
    overrides, metrics, monkeypatch, tmp_path, planted
):
    self_test = driver_module.require_certificate

    def self_test_then_plant(*args, **kwargs):
        self_test(*args, **kwargs)
        monkeypatch.setattr(sampler_module, "sample", planted)

    monkeypatch.setattr(driver_module, "require_certificate", self_test_then_plant)
    with pytest.raises(
        DrawError, match=r"First: request step1-\d+-row\d+/\d, response position \d+, sampled token \d+"
    ):
        run(load_config(overrides("actor_rollout_ref.rollout.top_k=12")))
    (row,) = metrics()
    assert row["bitwise/tokens_different"] == 0 < row["bitwise/tokens_redrawn_different"]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_every_token_is_compared_every_so_many_steps(overrides, metrics):
    more = ("actor_rollout_ref.actor.ppo_mini_batch_size=2", "trainer.audit_every_token_freq=2")
    run(load_config(overrides(*more, "trainer.audit_redraw_ratio=1.0")))
    compared = [row["bitwise/tokens_compared"] / row["rollout/num_tokens"] for row in metrics()]
    assert compared[1] == 1 > max(compared[0], compared[2])
    assert [row["timing_s/audit_forward"] > 0 for row in metrics()] == [False, True, False]
    assert all(row["bitwise/tokens_redrawn"] == row["bitwise/tokens_compared"] for row in metrics())


@pytest.mark.parametrize("exactness", ["strict", "warn"])
def test_the_self_test_finds_the_planted_linear_before_the_first_step(
    overrides, metrics, monkeypatch, tmp_path, exactness
):
    build = workers_module.build_engine

    def engine_with_planted_linear(*args):
        engine = build(*args)
        _plant(engine)
        return engine

    monkeypatch.setattr(workers_module, "build_engine", engine_with_planted_linear)
    config = load_config(overrides(f"trainer.exactness={exactness}", "trainer.total_training_steps=1"))
    if exactness == "strict":
        with pytest.raises(CertificateError, match=r"before the first step failed: \d+ of 40 .* token \d+, rollout -"):
            run(config)
        assert not (tmp_path / "run" / "metrics.jsonl").exists() or not metrics()
    else:
        assert run(config) == 0
        assert metrics()[0]["bitwise/tokens_different"] > 0
    assert json.loads((tmp_path / "run" / "certificate.json").read_text())["exact"] is False


def test_the_certificate_changes_nothing_and_lies_beside_every_checkpoint(overrides, tmp_path):
    more = ("trainer.total_training_steps=2", "trainer.save_freq=1")
    weights, samples = [], []
    for exactness in ("strict", "off"):
        root = tmp_path / exactness
        run(load_config(overrides(*more, f"trainer.exactness={exactness}", f"trainer.default_local_dir={root}")))
        weights.append((root / "checkpoints" / "step_2" / "model.safetensors").read_bytes())
        samples.append([(root / "samples" / f"step_{step}.jsonl").read_bytes() for step in (1, 2)])
    assert weights[0] == weights[1]
    assert samples[0] == samples[1]
    text = (tmp_path / "strict" / "certificate.json").read_text()
    certificate = json.loads(text)
    assert certificate["exact"] is True
    assert certificate["comparison"]["tokens_compared"] == 40
    assert certificate["rollout_attention"] == certificate["trainer_attention"] == "triton-invariant"
    assert certificate["environment"]["versions"]["torch"]
    assert certificate["seconds"] > 0
    assert len(certificate["tile_table"]) == 64
    for step in (1, 2):
        assert (tmp_path / "strict" / "checkpoints" / f"step_{step}" / "certificate.json").read_text() == text
    assert not (tmp_path / "off" / "certificate.json").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("actor_rollout_ref.actor.use_kl_loss=true", "actor_rollout_ref.actor.kl_loss_coef=0.1"),
        ("algorithm.use_kl_in_reward=true", "algorithm.adv_estimator=reinforce_plus_plus", "algorithm.gamma=0.99"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode=gspo", "actor_rollout_ref.actor.entropy_coeff=0.01"),
        (
            "reward.reward_kwargs.overlong_buffer_cfg={enable: true, len: 6, penalty_factor: 1.0}",
            "algorithm.adv_estimator=rloo",
        ),
    ],
)
def test_every_algorithm_trains_exactly(overrides, metrics, more):
    run(load_config(overrides(*more, "trainer.total_training_steps=2")))
    rows = metrics()
    assert all(row["bitwise/tokens_different"] == 0 and row["actor/grad_norm"] > 0 for row in rows)
    if "use_kl" in more[0]:
        name = "actor/kl_loss" if "loss" in more[0] else "actor/reward_kl_penalty"
        assert rows[0][name] == 0  # the policy still is the reference, bit for bit
        assert rows[1][name] != 0
    if "overlong" in more[0]:
        assert rows[0]["critic/rewards/mean"] < rows[0]["critic/score/mean"]


def test_more_prompts_a_step_than_rows_are_said_to_repeat(overrides, metrics, caplog):
    few = ("data.train_max_samples=3", "trainer.total_training_steps=null", "trainer.total_epochs=3")
    assert run(load_config(overrides(*few, "data.train_batch_size=3"))) == 0
    assert "several times" not in caplog.text
    assert len(metrics()) == 3
    assert run(load_config(overrides(*few, "data.train_batch_size=4", "trainer.resume_mode=disable"))) == 0
    assert "data.train_batch_size=4 is more than the 3 training rows, so a step holds the same prompt" in caplog.text
    assert len(metrics()) == 2


def test_dynamic_sampling_refills_and_gives_up_by_name(overrides, metrics, tiny, tmp_path):
    (tmp_path / "rare.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return float(ground_truth[-1] in '02468' and '1' in solution_str)\n"
    )
    rare = ("algorithm.filter_groups.enable=true", f"reward.custom_reward_function.path={tmp_path / 'rare.py'}")
    run(load_config(overrides(*rare, "trainer.total_training_steps=1")))
    (row,) = metrics()
    assert row["rollout/num_tokens"] > row["bitwise/tokens_compared"]
    assert row["actor/grad_norm"] > 0
    (tmp_path / "flat.py").write_text("def compute_score(*args, **kwargs):\n    return 0.5\n")
    flat = (
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=2",
        f"reward.custom_reward_function.path={tmp_path / 'flat.py'}",
        f"trainer.default_local_dir={tmp_path / 'other'}",
    )
    with pytest.raises(RuntimeError, match=r"after 2 generation batches only 0 of 4 .*max_num_gen_batches=2"):
        run(load_config(overrides(*flat)))


def test_dynamic_sampling_looks_at_the_penalised_reward_under_verls_names(overrides, metrics, tmp_path):
    (tmp_path / "flat.py").write_text("def compute_score(*args, **kwargs):\n    return 0.5\n")
    flat = (
        "algorithm.filter_groups.enable=true",
        "algorithm.filter_groups.max_num_gen_batches=1",
        f"reward.custom_reward_function.path={tmp_path / 'flat.py'}",
        "reward_model.reward_kwargs.overlong_buffer_cfg={enable: true, len: 6}",
        "trainer.total_training_steps=1",
    )
    with pytest.raises(RuntimeError, match=r"only 0 of 4 prompts have samples that differ in score"):
        run(load_config(overrides(*flat)))
    run(load_config(overrides(*flat, "algorithm.filter_groups.metric=seq_reward", "data.train_batch_size=1")))
    assert metrics()[0]["critic/rewards/min"] < metrics()[0]["critic/rewards/max"]


@pytest.mark.parametrize(("limit", "expected"), [(-1, 1), (30, 0)])
def test_dynamic_sampling_without_a_limit_warns_once_when_it_searches(overrides, caplog, tmp_path, limit, expected):
    (tmp_path / "rare.py").write_text(
        "calls = 0\n"
        "def compute_score(*args, **kwargs):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return float(calls > 8 * 16 and calls % 200 < 20)\n"
    )
    rare = (
        "algorithm.filter_groups.enable=true",
        f"algorithm.filter_groups.max_num_gen_batches={limit}",
        f"reward.custom_reward_function.path={tmp_path / 'rare.py'}",
        "trainer.total_training_steps=2",
        "data.max_response_length=2",
    )
    run(load_config(overrides(*rare)))
    warnings = [message for message in caplog.messages if "after 10 generation batches only" in message]
    assert len(warnings) == expected
    assert all("algorithm.filter_groups.max_num_gen_batches sets one" in message for message in warnings)
