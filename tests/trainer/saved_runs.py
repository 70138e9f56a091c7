"""States as a ``ShardWriter`` takes them, and checkpoints as earlier versions of the program wrote them."""

import json
import shutil

import torch

from vexact.trainer.checkpoint import load_checkpoint, manifest
from vexact.trainer.checkpoint.manifest import Digests


def flat(state):
    """A gathered state by the keys of a sharded one."""
    keys = {"num_updates": torch.tensor(state["num_updates"])}
    for name, parts in state["parameters"].items():
        for key, part in parts.items():
            keys[f"{key}.{name}"] = part if isinstance(part, torch.Tensor) else torch.tensor(int(part))
    return keys


def rewrite(path, version):
    """Turns a checkpoint into one of format 1 or 2; returns what ``trainer_state.pt`` holds."""
    progress, state = load_checkpoint(path)
    parameters = {
        name: {key: part.clone() if isinstance(part, torch.Tensor) else part for key, part in parts.items()}
        for name, parts in state["parameters"].items()
    }
    actor = {"num_updates": state["num_updates"], "parameters": parameters}
    saved = {"progress": (progress.step, progress.data_cursor), "actor": actor}
    shutil.rmtree(path / "trainer_state")
    for name in ("progress.json", "manifest.json", *(["identity.json"] if version == 1 else [])):
        (path / name).unlink()
    torch.save(saved | ({"format": version} if version > 1 else {}), path / "trainer_state.pt")
    if version > 1:
        with Digests(path) as digests:
            content = {"format": version, "step": progress.step, "files": digests.entries()}
        (path / "manifest.json").write_bytes(manifest._serialised(content))
        assert json.loads((path / "manifest.json").read_bytes())["format"] == version
    return saved
