"""No call to transformers runs a checkpoint's code, asks a question, or looks beyond this machine."""

from __future__ import annotations

import ast
import builtins
import json
from pathlib import Path

import pytest
from checkpoint_support import LLAMA, edit_json, write

from vexact.cli import main
from vexact.models import load_model
from vexact.models.tokenizer import read_tokenizer
from vexact.prepare.tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("vexact", "scripts", "benchmarks", "examples")
FACTORIES = ("from_pretrained", "from_config", "pipeline")


def calls():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                name = getattr(node.func, "attr", getattr(node.func, "id", "")) if isinstance(node, ast.Call) else ""
                if name in FACTORIES:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_every_call_says_what_it_may_do():
    found = dict(calls())
    assert len(found) >= 4
    for place, call in found.items():
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", place
        if call.func.attr != "from_config":  # reads no file, unless it runs code
            assert said.get("local_files_only") == "True", place


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """A checkpoint whose own code would leave a mark, on a terminal where nobody answers."""
    write(tmp_path, vocab_size=300)
    byte_tokenizer().save_pretrained(tmp_path)
    mark = tmp_path / "executed"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (tmp_path / f"{name}.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")

    def ask(prompt=""):
        raise AssertionError(f"a question was asked: {prompt}")

    monkeypatch.setattr(builtins, "input", ask)
    yield tmp_path
    assert not mark.exists()


MODEL_CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.mark.parametrize("command", ["verify", "generate"])
def test_a_model_with_code_of_its_own_is_refused(hostile, command, capsys):
    edit_json(hostile / "config.json", auto_map=MODEL_CODE)
    extra = ["--prompt=a"] if command == "generate" else []
    assert main([command, f"--model_path={hostile}", "--device=cpu", *extra]) == 2
    assert "config.json: auto_map=" in capsys.readouterr().err


@pytest.mark.parametrize("key", MODEL_CODE)
def test_each_way_to_bring_code(hostile, key):
    edit_json(hostile / "config.json", auto_map={key: MODEL_CODE[key]})
    with pytest.raises(ValueError, match="which is never executed"):
        load_model(hostile)


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(hostile, capsys):
    edit_json(
        hostile / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
        tokenizer_class="Own",
    )
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be loaded"):
        read_tokenizer(hostile)
    assert main(["generate", f"--model_path={hostile}", "--device=cpu", "--prompt=a"]) == 2
    assert "the tokenizer in" in capsys.readouterr().err


def test_a_tokenizer_that_needs_no_code_of_its_own_is_loaded_without_it(hostile):
    edit_json(hostile / "config.json", auto_map={"AutoTokenizer": ["tokenization_own.Own", "tokenization_own.Own"]})
    assert read_tokenizer(hostile)("a")["input_ids"] == byte_tokenizer()("a")["input_ids"]
    assert load_model(hostile).config.vocab_size == 300
    assert json.loads((hostile / "config.json").read_text())["model_type"] == LLAMA["model_type"]
