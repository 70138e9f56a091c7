"""`vexact generate` on a random model with a byte tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vexact import cli
from vexact.models import ModelConfig, random_model, save_hf
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine, SamplingParams


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    sizes = {
        "model_type": "qwen3",
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 16,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 128,
    }
    config = ModelConfig.from_hf_dict(sizes)
    save_hf(random_model(config, seed=0).named_parameters(), config, path)
    tokenizer.save_pretrained(path)
    return path


def generate(checkpoint: Path, *arguments: str) -> int:
    return cli.main(["generate", "--model_path", str(checkpoint), "--device", "cpu", "--max_tokens", "6", *arguments])


def test_prints_what_the_engine_samples_for_the_chat(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, "--prompt", "hello", "--system", "be brief") == 0
    printed = capsys.readouterr().out
    engine = Engine(checkpoint, device="cpu")
    chat = engine.tokenizer("<system>be brief\n<user>hello\n<assistant>")["input_ids"]
    (sample,) = engine.generate([chat], SamplingParams(max_tokens=6, temperature=0))
    assert printed == f"{sample.text}\n"


def test_raw_skips_the_template_and_every_answer_is_printed(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--prompt", "a", "--prompt", "b", "--raw", "--n", "2", "--temperature", "1", "--seed", "3")
    assert generate(checkpoint, *arguments) == 0
    printed = capsys.readouterr().out
    engine = Engine(checkpoint, device="cpu")
    prompts = [list(engine.tokenizer(text)["input_ids"]) for text in "ab"]
    samples = engine.generate(prompts, SamplingParams(n=2, max_tokens=6, seed=3))
    assert printed == "".join(f"{sample.text}\n" for sample in samples)
    assert len({sample.text for sample in samples}) > 1


def test_checkpoint_without_a_tokenizer_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in checkpoint.iterdir():
        if "token" not in file.name and file.suffix != ".jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert generate(tmp_path, "--prompt", "x") == 2
    assert "tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt", "x", "--prompt", "", "--raw"), "--prompt '': the prompt '' tokenises to nothing"),
        (("--prompt", "is <eos> text?"), "take it out. If the prompt is formatted already, give --raw"),
        (("--prompt", "x", "--system", "y", "--raw"), "--raw (leave out --system, or --raw) cannot format"),
        (("--prompt", "x", "--temperature", "nan"), "temperature=nan"),
    ],
)
def test_a_prompt_or_parameter_that_cannot_be_meant_is_a_message(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert generate(checkpoint, *arguments) == 2
    assert words in capsys.readouterr().err


def test_missing_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "nowhere", "--prompt", "x") == 2
    assert "nowhere" in capsys.readouterr().err


def test_an_answer_without_probabilities_is_refused_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = ModelConfig.from_hf_dir(checkpoint)
    model = random_model(config, seed=0)
    with torch.no_grad():
        model.norm.weight.fill_(3e38)
    save_hf(model.named_parameters(), config, tmp_path)
    assert generate(tmp_path, "--prompt", "x") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "request 0, response position 0: token " in printed.err
    assert "log-probability nan. Every weight is finite, so a number overflows" in printed.err


@pytest.mark.parametrize(
    ("option", "value"),
    [("min_tokens", "4"), ("logit_bias", '{"5": 1}'), ("bad_words", "a"), ("presence_penalty", "1")],
)
def test_what_cannot_be_exact_is_refused_with_the_reason(
    option: str, value: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(checkpoint, "--prompt", "a", f"--{option}", value) == 2
    assert f"sampling parameter {option}=" in capsys.readouterr().err
    assert generate(checkpoint, "--prompt", "a", "--raw", "--min_tokens", "0", "--repetition_penalty", "1.0") == 0
