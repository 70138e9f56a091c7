"""`vexact doctor` end to end, and its checks of data and reward."""

from __future__ import annotations

import json

import pytest

from vexact.audit.doctor import report
from vexact.audit.doctor.inputs import check_data, check_rewards
from vexact.audit.doctor.result import ok
from vexact.cli import main
from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import character_tokenizer
from vexact.reward.spec import RewardError
from vexact.types import Prompt, Score


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A model, rows and a reward; the machine's own checks replaced by one line, they have tests of their own."""
    tokenizer = character_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    raw = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = ModelConfig.from_hf_dict(raw)
    save_hf(random_model(config, seed=0).named_parameters(), config, tmp_path)
    rows = [{"prompt": f"{i}+1=", "reward_model": {"ground_truth": str(i + 1)}} for i in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(report, "machine_checks", lambda *args: iter([ok("machine", "fine")]))
    monkeypatch.setattr(report, "probe_checks", lambda device: iter([ok("probes", "fine")]))
    return tmp_path


def doctor(place, *overrides):
    return main(
        [
            "doctor",
            f"--model_path={place}",
            f"data.train_files={place / 'rows.jsonl'}",
            f"trainer.default_local_dir={place / 'run'}",
            "trainer.device=cpu",
            "reward.num_workers=1",
            *overrides,
        ]
    )


def test_a_good_configuration(place, capsys):
    assert doctor(place) == 0
    out = capsys.readouterr().out
    assert "ok       model: Qwen3ForCausalLM" in out
    assert "ok       data: 100 rows parsed, prompts of 4 to 5 tokens" in out
    assert "ok       reward: mean score 1 for the ground truths, 0 for empty answers, 8 rows" in out
    assert out.endswith("0 error\n")
    assert not (place / "run").exists(), "the doctor writes nothing"


def test_a_bad_configuration_is_an_error_line_and_exit_code_1(place, capsys):
    assert doctor(place, "trainer.sead=1") == 1
    out = capsys.readouterr().out
    assert "error    configuration: unknown key trainer.sead; did you mean trainer.seed" in out
    assert "probes: fine" in out, "the machine is checked all the same"


def test_a_bad_reward_and_bad_rows_are_error_lines(place, capsys):
    (place / "reward.py").write_text("def other(): pass\n")
    assert doctor(place, f"reward.custom_reward_function.path={place / 'reward.py'}") == 1
    assert "error    reward: " in capsys.readouterr().out
    (place / "rows.jsonl").write_text('{"question": "1+1="}')
    assert doctor(place) == 1
    assert "error    data: " in capsys.readouterr().out


def test_a_model_alone(place, capsys):
    assert main(["doctor", f"--model_path={place}"]) == 0
    assert "tokenizer: 19 tokens" in capsys.readouterr().out
    assert main(["doctor", f"--model_path={place / 'nowhere'}"]) == 1
    assert "error    model: " in capsys.readouterr().out


def test_the_rows_and_the_tokenizer_are_those_of_the_run(place, capsys):
    rows = (place / "rows.jsonl").read_text().splitlines()
    long = [json.dumps(json.loads(row) | {"prompt": "1+" * 300}) for row in rows]
    (place / "rows.jsonl").write_text("\n".join([*long, *long, *rows[:9]]))
    (place / "other").mkdir()
    for file in place.glob("*token*.json"):
        file.rename(place / "other" / file.name)
    key = "actor_rollout_ref.model.tokenizer_path"
    assert doctor(place, "data.filter_overlong_prompts=true", f"{key}={place / 'other'}") == 0
    out = capsys.readouterr().out
    assert "ok       data: 9 rows parsed" in out
    assert "ok       tokenizer: 19 tokens" in out
    assert doctor(place, "data.train_max_samples=2", "data.truncation=left", f"{key}={place / 'other'}") == 0
    assert "ok       data: 2 rows parsed" in capsys.readouterr().out


def test_a_baseline_is_a_warning(place, capsys):
    assert doctor(place, "actor_rollout_ref.rollout.mismatch.mode=k_order") == 0
    assert "warning  configuration: actor_rollout_ref.rollout.mismatch.mode=k_order cannot be exact" in (
        capsys.readouterr().out
    )


def test_data_that_cannot_be_read():
    def load():
        raise ValueError("no column\n'prompt'")

    result, prompts = check_data(load)
    assert (result.status, result.message, prompts) == ("error", "no column 'prompt'", [])


@pytest.mark.parametrize(
    ("right", "empty", "status", "part"),
    [
        (Score(1.0), Score(0.0), "ok", "mean score 1 for the ground truths"),
        (Score(0.0), Score(0.0), "warning", "mean score 0"),
        (Score(0.0, status="timeout", message="too slow"), Score(0.0), "error", "1 of 2 answers could not be graded"),
    ],
)
def test_the_reward_dry_run(right, empty, status, part):
    result = check_rewards(lambda prompts: ([right], [empty]), [Prompt(0, (1,), "p", "sum", "2", {})])
    assert result.status == status
    assert part in result.message


def test_a_grader_that_always_fails():
    def grade(prompts):
        raise RewardError("every one of 16 samples failed: KeyError")

    result = check_rewards(grade, [Prompt(0, (1,), "p", "sum", "2", {})])
    assert (result.status, "KeyError" in result.message) == ("error", True)
