"""What training refuses, the dry run refuses, without training and without writing anything."""

from __future__ import annotations

import json
import os
import re
import shutil
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vexact import cli
from vexact.config import Config, ConfigError, load_config
from vexact.config.fields import leaves
from vexact.config.schema import Keys
from vexact.distributed import Layout
from vexact.trainer.preflight import dry_run as dry
from vexact.trainer.step.sampling import training_sampling, validation_sampling

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
CPU = Layout(n_gpus_per_node=1, device="cpu", transport="local")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def refusal(overrides, capsys, tmp_path):
    """The message with which a dry run of the small run with more overrides ends; nothing may be written."""

    def run(*more: str) -> str:
        assert cli.main(["train", "--dry_run", *overrides(*more)]) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    return run


def test_a_good_run_is_printed_and_nothing_is_written(overrides, capsys, tiny, tmp_path):
    assert cli.main(["train", "--dry_run", *overrides()]) == 0
    output = capsys.readouterr().out
    assert f"path: {tiny / 'model'}" in output
    assert re.search(rf"run directory +{re.escape(str(tmp_path / 'run'))}\n", output)
    assert "4 prompts x 4 samples = 16 sequences" in output
    assert not (tmp_path / "run").exists()


def test_long_prompts_that_are_left_out_are_no_reason_to_refuse(overrides, capsys, tmp_path):
    row = {"data_source": "sum", "reward_model": {"ground_truth": "1"}}
    rows = [row | {"prompt": "1+" * 20}] * dry.ROWS + [row | {"prompt": "1="}]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    more = f"data.train_files={tmp_path / 'long.jsonl'}", "data.filter_overlong_prompts=true"
    assert cli.main(["train", "--dry_run", *overrides(*more)]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (f"{ACTOR}.clip_ratio=0", "must be > 0"),
        (f"{ACTOR}.clip_ratio_high=0", "must be > 0"),
        (f"{ACTOR}.clip_ratio_low=1.0", "must be > 0 and < 1"),
        (f"{ACTOR}.optim.betas=[0.9,1.0]", "must be >= 0 and < 1"),
        (f"{ACTOR}.optim.betas=[0.9]", "AdamW takes two"),
        (f"{ACTOR}.optim.betas=[0.9,0.9,0.9]", "AdamW takes two"),
        (f"{ACTOR}.optim.eps=1e-50", "is 0 in float32"),
        (f"{ACTOR}.kl_loss_coef=nan", "finite"),
        ("reward.timeout_s=inf", "finite"),
        ("reward.num_workers=1000000", "must be >= 1 and <= 1024"),
        (f"{ROLLOUT}.temperature=1e-5", "must be >= 0.001"),
        (f"{ROLLOUT}.val_kwargs.temperature=1e-5", "must be 0 (greedy) or at least 0.001"),
        (f"{ROLLOUT}.stop=['']", "a stop string must not be empty"),
        (f"{ROLLOUT}.stop=[a,'']", "a stop string must not be empty"),
        (f"{ROLLOUT}.stop_token_ids=[-5]", "must be >= 0"),
        (f"{ROLLOUT}.stop_token_ids=[100000]", "is outside the model's vocabulary of "),
        (f"{ROLLOUT}.cudagraph_capture_sizes=[]", "enforce_eager=true"),
        (f"{ROLLOUT}.max_model_len=4096", "exceeds the model's max_position_embeddings=128"),
        (f"{ROLLOUT}.kv_cache_bytes=100", "cannot hold one page"),
        (f"{ROLLOUT}.num_pages=2147483647", "takes "),
        (f"{ROLLOUT}.max_num_seqs=2147483647", "take "),
        ("trainer.seed=18446744073709551616", "<= 2^63 - 1"),
        ("trainer.profile_ranks=[0,3]", "there is no 3; this run's only rank is 0"),
        ("trainer.experiment_name=", "give it a name"),
        ("trainer.project_name=a\nb", "give it a name, on one line"),
        ("data.train_max_samples=0", "use -1 for all rows"),
        ("data.max_prompt_length=2", "more than data.max_prompt_length=2"),
        ("data.prompt_key=question", "question"),
        ("reward.custom_reward_function.name=nothing", "has no function 'nothing'"),
    ],
)
def test_a_refused_setting(refusal, setting, expected):
    assert expected in refusal(setting)


def change_norm(path: Path, value: float) -> None:
    tensors = load_file(path / "model.safetensors")
    norm = torch.full_like(tensors["model.norm.weight"], value)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()} | {"model.norm.weight": norm},
        path / "model.safetensors",
    )


def test_a_refused_model_or_file(refusal, tiny, tmp_path):
    def model(name: str, change) -> str:
        shutil.copytree(tiny / "model", tmp_path / name)
        change(tmp_path / name)
        return f"actor_rollout_ref.model.path={tmp_path / name}"

    def other_architecture(path: Path) -> None:
        raw = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(raw | {"architectures": ["GPT2LMHeadModel"]}))

    assert "has no weights" in refusal(model("bare", lambda path: (path / "model.safetensors").unlink()))
    assert "not even its whole header" in refusal(
        model("short", lambda path: os.truncate(path / "model.safetensors", 99))
    )
    assert "Git LFS pointer" in refusal(
        model("pointer", lambda path: (path / "model.safetensors").write_bytes(POINTER))
    )
    assert "not finite" in refusal(model("nan", lambda path: change_norm(path, float("nan"))))
    half = f"{ROLLOUT}.dtype=float16", f"{ACTOR}.fsdp_config.dtype=float16"
    assert "beyond float16, which ends at 65504" in refusal(model("wide", lambda path: change_norm(path, 7e4)), *half)
    assert "GPT2LMHeadModel" in refusal(model("other", other_architecture))
    assert "the tokenizer in" in refusal(model("mute", lambda path: (path / "tokenizer.json").unlink()))
    (tmp_path / "broken.parquet").write_text("no parquet")
    assert "broken.parquet" in refusal(f"data.val_files={tmp_path / 'broken.parquet'}")
    (tmp_path / "raises.py").write_text("def compute_score(*a, **k):\n    raise KeyError('no')\n")
    assert "KeyError" in refusal(f"reward.custom_reward_function.path={tmp_path / 'raises.py'}")
    assert "is a file" in refusal(f"trainer.default_local_dir={tiny / 'reward.py'}/run")
    missing = tmp_path / "gone"
    assert "no such directory" in refusal("trainer.resume_mode=resume_path", f"trainer.resume_from_path={missing}")


OF_MODEL_OR_MACHINE = (
    "KV cache",
    "key-value cache",
    "max_position_embeddings",
    "max_num_seqs",
    "vocabulary",
    "rank",
    "experts",
    "none to train",
    "but the model has 2 layers",
)


def refused(config: Config) -> str:
    try:
        dry.check_settings(config, CPU)
    except ValueError as error:
        return str(error)
    return ""


def test_whatever_a_configuration_accepts_its_parts_accept(overrides):
    """For every number, at both ends of its range and inside: the objects a run is built from refuse none of them."""
    accepted = 0
    for leaf in leaves(Keys):
        bounds, parts = leaf.metadata["range"], (leaf.hint, *typing.get_args(leaf.hint))
        if not {int, float} & set(parts):
            continue
        ends = [bounds["ge"], bounds["gt"] and bounds["gt"] * 1.01, bounds["lt"] and bounds["lt"] * 0.99, bounds["le"]]
        for number in [1, 0.5, 3e38, 2**31 - 1, *(end for end in ends if end is not None)]:
            sampled = ("val_kwargs.do_sample=true", "val_kwargs.temperature=1")
            more = [f"{ROLLOUT}.{setting}" for setting in sampled] if "val_kwargs" in leaf.key else []
            try:
                config = load_config(overrides(*more, f"{leaf.key}={number}"))
            except ConfigError:
                continue
            accepted += 1
            problem = refused(config)
            assert not problem or any(words in problem for words in OF_MODEL_OR_MACHINE), (leaf.key, number)
    assert accepted > 100


def test_sampling_is_what_the_configuration_says(overrides):
    config = load_config(overrides(f"{ROLLOUT}.stop=[a]", f"{ROLLOUT}.top_k=5", f"{ROLLOUT}.stop_token_ids=[3]"))
    training, validation = training_sampling(config), validation_sampling(config)
    assert (training.n, training.top_k, training.stop, training.stop_token_ids) == (4, 5, ("a",), (3,))
    assert (validation.temperature, validation.top_k, validation.stop) == (0.0, -1, ("a",))
    for ignore in (False, True):
        config = load_config(overrides(f"{ROLLOUT}.ignore_eos={str(ignore).lower()}"))
        assert training_sampling(config).ignore_eos == validation_sampling(config).ignore_eos == ignore


def test_rows_of_validation_are_looked_at_as_those_of_training(refusal, tiny, tmp_path):
    from transformers import AutoTokenizer

    def rows(name: str, *more: dict[str, object]) -> str:
        row = {"prompt": "1+2=", "data_source": "exact_match", "reward_model": {"ground_truth": "3"}}
        (tmp_path / name).write_text("".join(json.dumps(row | other) + "\n" for other in ({}, *more)))
        return str(tmp_path / name)

    built_in = (f"data.train_files={rows('train.jsonl')}", "reward.custom_reward_function.path=null")
    other = rows("quiz.jsonl", {"data_source": "my_quiz"})
    said = refusal(*built_in, f"data.val_files={other}")
    assert "data.val_files, rows of data_source 'my_quiz': " in said
    assert "no grader" in said
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "wide")
    wide = f"actor_rollout_ref.model.tokenizer_path={tmp_path / 'wide'}"
    tool = rows("tool.jsonl", {"prompt": "1+2=<tool>"})
    for key in ("data.val_files", "data.train_files"):
        said = refusal(*built_in, wide, f"{key}={tool}")
        assert f"{key}, row 1 ('1+2=<tool>'): token id" in said
        assert "is outside the model's vocabulary" in said
