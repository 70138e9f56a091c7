"""The run's tokenizer: its chat template is read, put in and looked at before any row."""

from __future__ import annotations

import json
import logging
import types

import pytest
import torch

from vexact.config import load_config
from vexact.models import ModelConfig, random_model
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine
from vexact.trainer.workers import load_tokenizer, parts

KEY = "actor_rollout_ref.model.custom_chat_template"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(path)
    return path


def load(folder, model_dir, template=None, kwargs=None):
    """Through a recipe, as JSON is YAML."""
    recipe = folder / "recipe.yaml"
    model = {"path": str(model_dir), "custom_chat_template": template}
    data = {"apply_chat_template_kwargs": kwargs or {}}
    recipe.write_text(json.dumps({"actor_rollout_ref": {"model": model}, "data": data}))
    return load_tokenizer(load_config([f"recipe={recipe}"], checked=False))


def test_a_template_in_a_file_is_read(tmp_path, model_dir):
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert load(tmp_path, model_dir, str(file)).chat_template == file.read_text()


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("no/such/file.jinja", rf"{KEY}='no/such/file\.jinja' is neither a Jinja template .* nor a file"),
        ("chatml", "is neither a Jinja template"),
        ("", "is neither a Jinja template"),
        ("{% for m in messages %}", rf"{KEY} is not a valid Jinja template: line 1"),
        ("{{ 'hello' }}", rf"{KEY}: {KEY} leaves out message 0 \(role 'user'\)"),
        ("{{ messages[0].role }}", "leaves out message 0"),
    ],
)
def test_a_template_that_cannot_be_meant_is_refused_at_the_start(tmp_path, model_dir, template, words):
    with pytest.raises(ValueError, match=words):
        load(tmp_path, model_dir, template)


def test_a_file_without_jinja_is_refused(tmp_path, model_dir):
    (tmp_path / "chat.jinja").write_text("chatml")
    with pytest.raises(ValueError, match=rf"{KEY} leaves out message 0"):
        load(tmp_path, model_dir, str(tmp_path / "chat.jinja"))


def test_the_tokenizers_own_broken_template_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages %}"
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"the chat template of the tokenizer in .*model is not a valid Jinja template"
    ):
        load(tmp_path, tmp_path / "model")


def test_template_arguments_are_checked_at_the_start(tmp_path, model_dir):
    with pytest.raises(ValueError, match="'tokenize' cannot be set"):
        load(tmp_path, model_dir, kwargs={"tokenize": True})


@pytest.mark.parametrize("text", ["{", "", "[]", '{"model": {}}'])
def test_a_broken_tokenizer_file_is_a_message(tmp_path, model_dir, text):
    for file in model_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer.*tokenizer_path names another"):
        load(tmp_path, tmp_path)


@pytest.mark.parametrize(("eos", "stop", "told"), [(None, (), True), (None, ("\n",), False), (5, (), False)])
def test_a_run_without_any_end_of_sequence_token_is_told(monkeypatch, caplog, eos, stop, told):
    raw = {"architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48}
    raw |= {"num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
    model = random_model(ModelConfig.from_hf_dict(raw | {"eos_token_id": eos}), 0)
    monkeypatch.setattr(parts, "Engine", lambda path, **_: Engine(model=model))
    config = load_config([f"actor_rollout_ref.rollout.stop={json.dumps(stop)}"], checked=False)
    tokenizer = types.SimpleNamespace()
    with caplog.at_level(logging.WARNING, logger="vexact"):
        parts.build_engine(config, tokenizer, torch.device("cpu"))
    assert ("names an end-of-sequence token" in caplog.text) == told
