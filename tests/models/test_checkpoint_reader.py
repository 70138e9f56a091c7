"""Every tensor has one file, and every file that is not what its name says is named."""

from __future__ import annotations

import json
import logging
import os
import random

import pytest
import torch
from checkpoint_support import INDEX, WEIGHTS, edit_json, edit_weights, same, split, write
from safetensors.torch import load_file, save_file

from vexact.models import load_model
from vexact.models.checkpoint import CheckpointReader
from vexact.models.checkpoint.index import check_one_reading


@pytest.mark.parametrize("name", ["model-00003-of-00003.safetensors", "ema.safetensors", "a.safetensors", WEIGHTS])
def test_a_file_that_the_index_does_not_name_is_not_read(tmp_path, name, caplog):
    wanted = write(tmp_path)
    write(tmp_path / "other", seed=1)
    split(tmp_path)
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / name)
    with caplog.at_level(logging.WARNING):
        assert same(tmp_path, wanted)
    assert f"not read, because the checkpoint does not name it: {name}" in caplog.text


def test_what_a_mac_leaves_beside_a_file_is_no_checkpoint(tmp_path):
    wanted = write(tmp_path)
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7\0\2")
    assert same(tmp_path, wanted)


def test_transformers_would_read_the_single_file_beside_an_index(tmp_path):
    write(tmp_path)
    split(tmp_path)
    check_one_reading(tmp_path)
    write(tmp_path / "other", seed=1)
    (tmp_path / "other" / WEIGHTS).rename(tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=rf"transformers would read .*{WEIGHTS}"):
        check_one_reading(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["weights.safetensors"], rf"no {WEIGHTS} and no .*, only weights\.safetensors; rename it"),
        (["model-00001-of-00002.safetensors"], r"only model-00001-of-00002"),
        ([WEIGHTS, "ema.safetensors"], r"2 safetensors files \(ema\.safetensors, model\.safetensors\)"),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], "2 safetensors files"),
    ],
)
def test_without_an_index_there_is_one_file_of_one_name(tmp_path, names, message):
    write(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).unlink()
    for name in names:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "only PyTorch pickles, which are never opened"),
        ("consolidated.00.pth", "only PyTorch pickles"),
        ("model.Q4_K_M.gguf", "only GGUF files"),
        ("tf_model.h5", "only TensorFlow files"),
        ("readme.txt", "convert the checkpoint with transformers' save_pretrained"),
    ],
)
def test_other_formats_are_named(tmp_path, name, message):
    write(tmp_path)
    (tmp_path / WEIGHTS).rename(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=message):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "merge it into its base model"),
        ("hf_quant_config.json", "quantised"),
        ("quantize_config.json", "quantised"),
    ],
)
def test_files_that_make_it_another_kind_of_checkpoint(tmp_path, name, message):
    write(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        load_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=name):
        load_model(tmp_path)


def _index(change):
    def spoil(path):
        index = json.loads((path / INDEX).read_text())
        change(index["weight_map"])
        (path / INDEX).write_text(json.dumps(index))

    return spoil


def _both_hold_it(path):
    first, second = sorted(path.glob("model-*"))
    edit_weights(second, **{name: tensor for name, tensor in load_file(first).items() if name == "model.norm.weight"})
    edit_weights(first, **{name: tensor for name, tensor in load_file(second).items() if name == "model.norm.weight"})


NORM = "model.norm.weight"
TWICE = (
    '{"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors", '
    '"model.norm.weight": "model-00002-of-00002.safetensors"}}'
)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / INDEX).write_text("{"), rf"{INDEX} is not valid JSON"),
        (lambda path: (path / INDEX).write_text("[1]"), rf"{INDEX} holds a JSON list"),
        (lambda path: (path / INDEX).write_text("{}"), rf"{INDEX} has no weight_map"),
        (lambda path: (path / INDEX).write_text('{"weight_map": ["a"]}'), rf"{INDEX} has no weight_map"),
        (lambda path: (path / INDEX).write_text(TWICE), rf"{INDEX} has the key '{NORM}' twice"),
        (lambda path: (path / INDEX).write_text(""), rf"{INDEX} is empty"),
        (_index(lambda where: where.update({NORM: "../other.safetensors"})), "outside its directory"),
        (_index(lambda where: where.update({NORM: "/other.safetensors"})), "outside its directory"),
        (_index(lambda where: where.update({NORM: 3})), f"places {NORM} in 3, which is no safetensors file"),
        (_index(lambda where: where.update({NORM: "pytorch_model.bin"})), "which is no safetensors file"),
        (_index(lambda where: where.update({NORM: "model-00009-of-00009.safetensors"})), "00009.* does not exist"),
        (
            _index(lambda where: where.update(more="model-00001-of-00002.safetensors")),
            "00001-of.* not hold: more",
        ),
        (_index(lambda where: where.pop(NORM)), f"holds {NORM}, which {INDEX} does not name"),
        (_both_hold_it, f"holds {NORM}, which {INDEX} places in .*: two files hold it"),
        (lambda path: (path / "model-00002-of-00002.safetensors").unlink(), "00002-of-00002.* does not exist"),
    ],
)
def test_an_index_that_does_not_fit_its_files(tmp_path, spoil, message):
    write(tmp_path)
    split(tmp_path)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_model(tmp_path)


IMPOSTORS = {
    "empty": (lambda old: b"", "is empty"),
    "lfs": (lambda old: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
    "page": (lambda old: b"\n <!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
    "xml": (lambda old: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page or XML"),
    "zeros": (lambda old: bytes(len(old)), "zero bytes"),
    "gzip": (lambda old: b"\x1f\x8b\x08\0" + old, "compressed"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS, INDEX])
def test_downloads_that_are_not_the_file(tmp_path, kind, name):
    content, message = IMPOSTORS[kind]
    write(tmp_path)
    if name == INDEX:
        split(tmp_path)
    file = tmp_path / name
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} .*{message}"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", WEIGHTS, INDEX])
def test_what_is_no_file(tmp_path, name):
    write(tmp_path)
    if name == INDEX:
        split(tmp_path)
    file = tmp_path / name
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"{name} is a link that leads nowhere"):
        load_model(tmp_path)
    file.unlink()
    file.mkdir()
    with pytest.raises(ValueError, match=rf"{name} is a directory, not a file"):
        load_model(tmp_path)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{name} is a device or pipe"):
        load_model(tmp_path)


def test_a_file_that_must_not_be_read(tmp_path, monkeypatch):
    write(tmp_path)

    def closed(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", closed)
    with pytest.raises(PermissionError, match=r"config\.json cannot be read: permission denied"):
        load_model(tmp_path)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.7, 0.999])
def test_part_of_a_file(tmp_path, share):
    write(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    kept = int(len(content) * share)
    (tmp_path / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} has {kept} "):
        load_model(tmp_path)


def test_any_byte_of_a_header_may_be_wrong(tmp_path):
    """A header with a flipped bit is refused, or places every tensor as before (a flip in ignored metadata)."""
    wanted = write(tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    draw, refused = random.Random(0), 0
    for _ in range(200):
        position, bit = draw.randrange(end), 1 << draw.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= bit
        (tmp_path / WEIGHTS).write_bytes(flipped)
        try:
            loads_as_before = same(tmp_path, wanted)
        except ValueError as error:
            loads_as_before = str(tmp_path) in str(error)
            refused += 1
        assert loads_as_before, f"byte {position} xor {bit} loads other weights, or the message names no file"
    assert refused > 150


def test_a_path_that_is_no_directory(tmp_path):
    write(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"config\.json is a file; give the checkpoint directory"):
        load_model(tmp_path / "config.json")


def test_the_home_directory_may_be_abbreviated(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = write(tmp_path / "model")
    assert same("~/model", wanted)


def test_tensors_are_read_one_at_a_time(tmp_path):
    model = write(tmp_path)
    split(tmp_path, 3)
    with CheckpointReader(tmp_path) as reader:
        assert len(reader) == len(list(reader)) == 21
        assert reader.shape("lm_head.weight") == (40, 16)
        assert reader.dtype("lm_head.weight") == "F32"
        assert reader.file("lm_head.weight").name.endswith("-of-00003.safetensors")
        head = reader.tensor("lm_head.weight")
    assert torch.equal(head, model.lm_head.weight), "it outlives the reader"


def test_an_index_over_one_file_and_over_a_folder_below(tmp_path):
    wanted = write(tmp_path)
    (first, second) = split(tmp_path)
    (tmp_path / "parts").mkdir()
    second.rename(tmp_path / "parts" / second.name)
    where = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    edit_json(tmp_path / INDEX, weight_map={k: v if v == first.name else f"parts/{v}" for k, v in where.items()})
    assert same(tmp_path, wanted)
    write(tmp_path / "one")
    names = dict.fromkeys(load_file(tmp_path / "one" / WEIGHTS), WEIGHTS)
    edit_json(tmp_path / "one" / INDEX, weight_map=names)
    assert same(tmp_path / "one", wanted)
    save_file({"stray": torch.zeros(1)}, tmp_path / "one" / "stray.safetensors")
    assert same(tmp_path / "one", wanted)
