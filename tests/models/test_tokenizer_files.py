"""A tokenizer that cannot be read is named, by file."""

from __future__ import annotations

import pytest
from checkpoint_support import LLAMA
from transformers import AutoConfig

from vexact.models import ModelConfig, random_model, save_hf
from vexact.models.tokenizer import has_tokenizer, read_tokenizer
from vexact.prepare.tokenizers import byte_tokenizer
from vexact.rollout import Engine

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


@pytest.fixture
def folder(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_a_good_one(folder):
    assert has_tokenizer(folder)
    assert read_tokenizer(folder)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


def test_none(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer in .*; put tokenizer\.json and tokenizer_config\.json there"):
        read_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", POINTER, "is a Git LFS pointer"),
        ("tokenizer.json", b"", "is empty"),
        ("tokenizer.json", b"<!doctype html><html>", "is a web page"),
        ("tokenizer.json", b'{"version": "1.0", "mod', "is not valid JSON"),
        ("tokenizer.json", b"\xff\xfe{}", "is not valid JSON"),
        ("tokenizer_config.json", POINTER, "is a Git LFS pointer"),
        ("tokenizer_config.json", b"", "is empty"),
        ("tokenizer_config.json", b"[]", r"holds a JSON list"),
        ("tokenizer_config.json", b'{"a": ', "is not valid JSON"),
        ("special_tokens_map.json", POINTER, "is a Git LFS pointer"),
        ("special_tokens_map.json", b"{'a': 1}", "is not valid JSON"),
        ("added_tokens.json", b"nonsense", "is not valid JSON"),
        ("chat_template.jinja", POINTER, "is a Git LFS pointer"),
        ("chat_template.jinja", b"<html>404</html>", "is a web page"),
    ],
)
def test_a_broken_file(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} {message}"):
        read_tokenizer(folder)


@pytest.mark.parametrize("content", [b"{}", b'{"version": "1.0", "model": {"type": "Nothing"}}', b'{"model": 3}'])
def test_json_that_is_no_tokenizer(folder, content):
    (folder / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"the tokenizer in {folder} cannot be loaded \(.+\); copy its files again"):
        read_tokenizer(folder)


@pytest.mark.parametrize("settings", [b'{"model_max_length": "many"}', b'{"eos_token": 3}', b'{"tokenizer_class": 5}'])
def test_settings_of_the_wrong_type(folder, settings):
    (folder / "tokenizer_config.json").write_bytes(settings)
    with pytest.raises(ValueError, match=rf"the tokenizer in {folder} cannot be loaded \(.+\); copy its files again"):
        read_tokenizer(folder)


def test_a_config_that_transformers_does_not_take_is_not_the_tokenizers_fault(folder, monkeypatch):
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')

    def refuse(*args, **kwargs):
        raise TypeError("Validation error for field 'router_aux_loss_coef':\n    expected float, got int (value: 0)")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(
        ValueError, match=r"config\.json: transformers, .*'router_aux_loss_coef': expected float, got int"
    ):
        read_tokenizer(folder)


def test_a_config_of_no_known_architecture_does_not_matter(folder):
    (folder / "config.json").write_text('{"model_type": "none_such"}')
    assert read_tokenizer(folder)("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]
    (folder / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded"):
        read_tokenizer(folder)


def test_a_directory_in_the_place_of_a_file(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match=r"tokenizer\.json is a directory"):
        read_tokenizer(folder)


def test_the_engine_names_the_file(folder):
    config = ModelConfig.from_hf_dict(LLAMA | {"vocab_size": 300})
    save_hf(random_model(config, 0).named_parameters(), config, folder)
    assert Engine(folder, device="cpu").tokenizer is not None
    (folder / "tokenizer.json").write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"tokenizer\.json is a Git LFS pointer"):
        Engine(folder, device="cpu")
    for file in folder.glob("*token*"):
        file.unlink()
    assert Engine(folder, device="cpu").tokenizer is None
