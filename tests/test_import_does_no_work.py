"""`import vexact` and the command line's own imports touch nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from processes import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "triton",
    "transformers",
    "hydra",
    "omegaconf",
    "numpy",
    "wandb",
    "ray",
    "pyarrow",
    "starlette",
    "uvicorn",
    "pydantic",
)


def loaded_after(statement: str) -> list[str]:
    """Modules that a fresh interpreter holds after ``statement``, which must print nothing itself."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    return result.stdout.split()


def test_import_vexact_loads_nothing_else() -> None:
    assert loaded_after("import vexact") == ["vexact"]


def test_command_line_starts_light() -> None:
    roots = {name.split(".")[0] for name in loaded_after("import vexact.cli; vexact.cli.parser()")}
    assert roots.isdisjoint(HEAVY)


def test_a_model_is_built_without_a_compiler() -> None:
    """PyTorch's takes over a second to import, in every process of a run."""
    shape = "hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1"
    config = f"dict(architectures=['Qwen3ForCausalLM'], vocab_size=8, head_dim=8, max_position_embeddings=8, {shape})"
    loaded = loaded_after(f"from vexact.models import *; random_model(ModelConfig.from_hf_dict({config}), 1)")
    assert "vexact.models.decoder" in loaded
    assert "torch._dynamo" not in loaded


def test_packages_patch_nothing_and_touch_no_device() -> None:
    code = (
        "import torch; "
        "before = {name: getattr(torch, name) for name in ('matmul', 'mm', 'log_softmax', 'softmax', 'sum')}; "
        "import vexact.ops, vexact.models, vexact.swaps, vexact.rollout, vexact.training, vexact.algorithms; "
        "changed = [name for name, value in before.items() if getattr(torch, name) is not value]; "
        "assert not changed, changed; assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
