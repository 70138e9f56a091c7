"""Which safetensors files make up a checkpoint, and which tensor the index places in which of them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from vexact.models.checkpoint.files import is_there, listed, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{total:05d}.safetensors"
SHARD_PATTERN = "model-[0-9]*-of-[0-9]*.safetensors"
VISIBLE = "[!.]*.safetensors"  # a name with a leading dot is a file system's note beside the file, as macOS leaves them

_CONVERT = "convert it to safetensors with transformers' save_pretrained"
_OTHER_FORMATS = {
    "pytorch_model.bin.index.json": f"PyTorch pickles, which are never opened; {_CONVERT}",
    "*.bin": f"PyTorch pickles, which are never opened; {_CONVERT}",
    "*.pth": f"PyTorch pickles, which are never opened; {_CONVERT}",
    "*.pt": f"PyTorch pickles, which are never opened; {_CONVERT}",
    "*.gguf": "GGUF files; give the safetensors checkpoint that they were made of",
    "*.onnx": f"ONNX files; {_CONVERT}",
    "*.h5": f"TensorFlow files; {_CONVERT}",
    "*.msgpack": f"Flax files; {_CONVERT}",
}


def read_index(directory: Path) -> dict[str, Path] | None:
    """Tensor name to file as the index says, or None without an index.

    Raises:
        ValueError: the index is damaged, or names files outside the directory or of another kind.
    """
    index = directory / INDEX
    if not is_there(index):
        return None
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map that places tensors in files; download or copy it again")
    return {name: directory / _plain(index, name, file) for name, file in where.items()}


def single_file(directory: Path) -> Path:
    """The file of a checkpoint without an index.

    Raises:
        FileNotFoundError: no weights.
        ValueError: several files could hold them, or one under a name that says it is a part.
    """
    found = sorted(path.name for path in directory.glob(VISIBLE))
    if is_there(directory / SINGLE) and len(found) <= 1:
        return directory / SINGLE
    if not found:
        raise FileNotFoundError(f"model directory {directory} has no weights ({SINGLE}){_instead(directory)}")
    if len(found) == 1:
        raise ValueError(
            f"{directory} has no {SINGLE} and no {INDEX}, only {found[0]}; rename it to {SINGLE} if it holds the whole "
            "model, else copy the other files of the checkpoint"
        )
    raise ValueError(
        f"{directory} holds {len(found)} safetensors files ({listed(found)}) and no {INDEX} that says which tensor "
        "comes from which; copy the index of the checkpoint, or remove the files that do not belong to it"
    )


def check_one_reading(directory: Path) -> None:
    """Raises ValueError where transformers would read a single file although there is an index, which we follow."""
    index = read_index(directory)
    if index is not None and is_there(directory / SINGLE) and set(index.values()) != {directory / SINGLE}:
        raise ValueError(
            f"transformers would read {directory / SINGLE}, but {INDEX} names other files; remove one of them"
        )


def _plain(index: Path, name: str, file: object) -> str:
    if not isinstance(file, str) or not file.endswith(".safetensors"):
        raise ValueError(f"{index} places {name} in {file!r}, which is no safetensors file; copy the right index")
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts or "\0" in file:
        raise ValueError(f"{index} places {name} in {file!r}, outside its directory; copy the right index")
    return file


def _instead(directory: Path) -> str:
    for pattern, what in _OTHER_FORMATS.items():
        if any(directory.glob(pattern)):
            return f", only {what}"
    return "; convert the checkpoint with transformers' save_pretrained"
