"""A save leaves the new checkpoint, the old one, or a directory that is refused; never parts of two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_support import INDEX, LLAMA, WEIGHTS, edit_json, same, write
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from vexact.models import ModelConfig, load, load_model, random_model, save_hf

SIZES = {"one file": 1 << 30, "two files": 5_000, "many files": 2_500}


def save(path, model, size):
    load_limit = load.MAX_SHARD_BYTES
    load.MAX_SHARD_BYTES = SIZES[size]
    try:
        save_hf(model.named_parameters(), model.config, path)
    finally:
        load.MAX_SHARD_BYTES = load_limit


def model_of(seed, **changes):
    return random_model(ModelConfig.from_hf_dict(LLAMA | changes), seed)


@pytest.mark.parametrize("before", SIZES)
@pytest.mark.parametrize("after", SIZES)
def test_nothing_of_an_earlier_save_stays(tmp_path, before, after):
    first = model_of(1, num_hidden_layers=3, eos_token_id=[2, 3], rope_parameters={"rope_theta": 5e5})
    second = model_of(2, eos_token_id=None)
    (tmp_path / "tokenizer.json").write_text("{}")
    save(tmp_path, first, before)
    assert same(tmp_path, first)
    assert ModelConfig.from_hf_dir(tmp_path).eos_token_ids == (2, 3)
    save(tmp_path, second, after)
    assert same(tmp_path, second)
    assert ModelConfig.from_hf_dir(tmp_path).eos_token_ids == ()
    save(tmp_path / "fresh", second, after)
    names = [{path.name for path in folder.iterdir() if path.is_file()} for folder in (tmp_path, tmp_path / "fresh")]
    assert names[0] - names[1] == {"tokenizer.json"}


def test_other_files_stay_and_are_not_taken_for_weights(tmp_path):
    write(tmp_path / "other", seed=5)
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / "ema.safetensors")
    kept = (tmp_path / "ema.safetensors").read_bytes()
    model = model_of(1)
    save(tmp_path, model, "one file")
    assert same(tmp_path, model)
    assert (tmp_path / "ema.safetensors").read_bytes() == kept
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize("before", SIZES)
@pytest.mark.parametrize("after", SIZES)
def test_a_save_that_dies_at_any_step(tmp_path, monkeypatch, before, after):
    """At every removal and rename, in the order in which they happen."""
    first, second = model_of(1), model_of(2, rope_parameters={"rope_theta": 5e5})
    seen, steps = set(), 0
    monkeypatch.setattr("os.fsync", lambda descriptor: None)  # the order of calls is what is tried, not the disk
    real = {name: getattr(Path, name) for name in ("unlink", "replace", "rename", "rmdir")}

    def dying(name):
        def call(self, *args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real[name](self, *args, **kwargs)

        return call

    while "done" not in seen:
        directory = tmp_path / str(steps)
        save(directory, first, before)
        left = steps
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(Path, name, dying(name))
            try:
                save(directory, second, after)
                seen.add("done")
            except Killed:
                pass
        try:
            loaded = load_model(directory)
        except FileNotFoundError as error:
            seen.add("refused" if "a save was interrupted while it replaced the files: move" in str(error) else error)
        else:
            is_new = loaded.config.rope == second.config.rope
            assert same(directory, second if is_new else first)
            seen.add("new" if is_new else "old")
        save(directory, second, after)
        assert same(directory, second), "the next save is whole again"
        steps += 1
    assert seen == {"done", "old", "refused", "new"}


def test_what_an_interrupted_save_left_can_be_moved_into_place(tmp_path, monkeypatch):
    first, second = model_of(1), model_of(2)
    save(tmp_path, first, "many files")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            save(tmp_path, second, "two files")
    with pytest.raises(FileNotFoundError, match=r"move what is in .*\.unfinished-save into"):
        load_model(tmp_path)
    for file in (tmp_path / ".unfinished-save").iterdir():
        file.rename(tmp_path / file.name)
    assert same(tmp_path, second)


def test_a_failed_save_leaves_the_old_checkpoint_alone(tmp_path):
    first = model_of(1)
    save(tmp_path, first, "two files")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def failing():
        yield from list(model_of(2).named_parameters())[:4]
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_hf(failing(), first.config, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_killed_process_never_leaves_parts_of_two(tmp_path):
    """A real SIGKILL, while one process saves two models in turn as fast as it can."""
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from test_checkpoint_writer import *;"
        "models = [model_of(1), model_of(2, rope_parameters={'rope_theta': 5e5})];"
        "directory = Path(sys.argv[2]); save(directory, models[0], 'two files'); print('go', flush=True);"
        "[save(directory, models[i % 2], size) for i in range(10**6) for size in SIZES]"
    )
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"go\n"
        process.send_signal(signal.SIGKILL)
    try:
        loaded = load_model(tmp_path)
    except FileNotFoundError as error:
        whole = "interrupted" in str(error)
    else:
        whole = same(tmp_path, model_of(1) if loaded.config.rope.theta == 1e4 else model_of(2))
    assert whole


@pytest.mark.parametrize("size", SIZES)
def test_a_save_is_read_by_transformers_as_by_us(tmp_path, size):
    model = model_of(3, torch_dtype="bfloat16")
    save(tmp_path, model, size)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["dtype"] == "float32"
    assert "torch_dtype" not in raw
    assert (tmp_path / INDEX).exists() == (size != "one file")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.model.embed_tokens.weight, model.embed_tokens.weight)
    assert torch.equal(theirs.lm_head.weight, model.lm_head.weight)
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_stop_tokens_of_generation_config_survive_load_and_save(tmp_path):
    write(tmp_path / "first")
    edit_json(tmp_path / "first" / "generation_config.json", eos_token_id=[7, 8])
    model = load_model(tmp_path / "first")
    save_hf(model.named_parameters(), model.config, tmp_path / "second")
    assert ModelConfig.from_hf_dir(tmp_path / "second").eos_token_ids == (7, 8)
