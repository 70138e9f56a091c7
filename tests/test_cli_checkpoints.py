"""Every command says what is wrong with a checkpoint, names the file, and ends with 2; the doctor with a line and 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vexact.audit.doctor import report
from vexact.audit.doctor.result import ok
from vexact.cli import main
from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import byte_tokenizer

RAW = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    config = ModelConfig.from_hf_dict(RAW)
    save_hf(random_model(config, seed=0).named_parameters(), config, tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "reward_model": {"ground_truth": "2"}}\n' * 40)
    monkeypatch.setattr(report, "machine_checks", lambda *args: iter([ok("machine", "fine")]))
    monkeypatch.setattr(report, "probe_checks", lambda device: iter([ok("probes", "fine")]))
    return tmp_path


def _keys(**changes):
    def spoil(model: Path) -> None:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return spoil


def _content(name, content):
    return lambda model: (model / name).write_bytes(content)


def _weights(**changes):
    def spoil(model: Path) -> None:
        file = model / "model.safetensors"
        save_file({name: tensor.clone() for name, tensor in load_file(file).items()} | changes, file)

    return spoil


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
DEFECTS = {
    "broken config": (_content("config.json", b"{"), "config.json is not valid JSON"),
    "null layers": (_keys(num_hidden_layers=None), "config.json: num_hidden_layers=null"),
    "text size": (_keys(hidden_size="16"), 'config.json: hidden_size="16"'),
    "kv heads": (_keys(num_attention_heads=4, num_key_value_heads=3), "config.json: num_key_value_heads=3"),
    "rope": (_keys(rope_scaling={"type": "linear", "factor": 0}), "config.json: rope_scaling.factor=0"),
    "stop token": (
        _content("generation_config.json", b'{"eos_token_id": 300}'),
        "generation_config.json: eos_token_id",
    ),
    "pointer": (_content("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer"),
    "not a number": (_weights(**{"model.norm.weight": torch.full((16,), float("nan"))}), "model.norm.weight has 16"),
    "no use": (_weights(**{"model.norm.bias": torch.zeros(16)}), "model.norm.bias"),
    "quantised": (_keys(quantization_config={"bits": 4}), "config.json: quantization_config"),
    "tokenizer": (_content("tokenizer.json", POINTER), "tokenizer.json is a Git LFS pointer"),
}


def arguments(command: str, place: Path) -> list[str]:
    model, run = place / "model", place / "run"
    overrides = [
        f"actor_rollout_ref.model.path={model}",
        f"data.train_files={place / 'rows.jsonl'}",
        f"trainer.default_local_dir={run}",
        "data.max_prompt_length=64",
        "data.max_response_length=64",
        "trainer.device=cpu",
        "reward.num_workers=1",
    ]
    return {
        "train": ["train", *overrides],
        "dry run": ["train", "--dry_run", *overrides],
        "verify": ["verify", f"--model_path={model}", "--device=cpu"],
        "generate": ["generate", f"--model_path={model}", "--device=cpu", "--prompt=1+1="],
        "doctor": ["doctor", *overrides],
        "doctor, model alone": ["doctor", f"--model_path={model}"],
    }[command]


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("command", ["train", "verify", "generate"])
def test_commands(place, capsys, command, defect):
    spoil, message = DEFECTS[defect]
    spoil(place / "model")
    assert main(arguments(command, place)) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(place / "model") in err
    assert not (place / "run").exists()


@pytest.mark.parametrize("defect", ["broken config", "null layers", "text size", "rope", "stop token", "quantised"])
def test_a_dry_run_refuses_a_configuration_that_train_refuses(place, capsys, defect):
    spoil, message = DEFECTS[defect]
    spoil(place / "model")
    assert main(arguments("dry run", place)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("command", ["doctor", "doctor, model alone"])
def test_the_doctor(place, capsys, command, defect):
    spoil, message = DEFECTS[defect]
    spoil(place / "model")
    assert main(arguments(command, place)) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if message in line)
    assert line.startswith("error  ")
    assert "probes: fine" in out


def test_the_doctor_does_not_crash_on_what_nobody_foresaw(place, capsys, monkeypatch):
    from vexact.audit.doctor import model

    def crash(*args, **kwargs):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(model, "load_model", crash)
    assert main(arguments("doctor, model alone", place)) == 1
    assert "error    model: RuntimeError: out of memory" in capsys.readouterr().out


def test_the_doctor_knows_what_the_run_computes_in(place, capsys):
    _weights(**{"model.norm.weight": torch.full((16,), 1e6)})(place / "model")
    both = ("actor_rollout_ref.rollout.dtype=float16", "actor_rollout_ref.actor.fsdp_config.dtype=float16")
    assert main([*arguments("doctor", place), *both]) == 1
    assert "model.norm.weight has 16 of 16 values beyond float16" in capsys.readouterr().out
