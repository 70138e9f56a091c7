"""A model on the operators: the guard over a tiny one, and whether the user's can be loaded."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vexact.audit.doctor.result import GIB, CheckResult, error, ok, warning
from vexact.audit.guard import ReductionGuard, watch
from vexact.models import CausalLM, ModelConfig, load_model, random_model
from vexact.models.decoder import Targets
from vexact.models.tokenizer import has_tokenizer, read_tokenizer
from vexact.ops import PackedMetadata
from vexact.rollout import Engine, SamplingParams

_TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}
_EXPERTS = _TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


def check_guard(device: str, make: Callable[..., CausalLM] = random_model) -> CheckResult:
    """Rollout and training forward of tiny random models, dense and with experts, under the guard; ``make`` builds
    them."""
    models = [make(ModelConfig.from_hf_dict(raw), seed=0, device=device) for raw in (_TINY, _EXPERTS)]
    guard = watch(lambda: _both_sides(*models))
    return guard_result(guard)


def guard_result(guard: ReductionGuard) -> CheckResult:
    """The line for what ``guard`` saw."""
    found = guard.findings
    if found:
        return error(
            "guard",
            f"{len(found)} reductions outside vexact.ops, the first: {found[0]}",
            "make the model call the operator of vexact.ops instead",
        )
    watched = f"{guard.num_inside} inside" if guard.num_inside else "its kernels do not pass through PyTorch"
    return ok("guard", f"no reduction outside vexact.ops in rollout and training forward ({watched})")


def _both_sides(*models: CausalLM) -> None:
    for model in models:
        _both_sides_of(model)


def _both_sides_of(model: CausalLM) -> None:
    device = model.lm_head_weight.device
    params = SamplingParams(n=2, max_tokens=4, ignore_eos=True, temperature=0.9, top_p=0.9)
    samples = Engine(model=model, max_model_len=64).generate([[1, 2, 3, 4, 5], [6, 7]], params)
    tokens = [(*sample.prompt_token_ids, *sample.token_ids) for sample in samples]
    total = sum(map(len, tokens))
    ids = torch.tensor([token for sequence in tokens for token in sequence], device=device)
    positions = torch.cat([torch.arange(len(sequence), device=device) for sequence in tokens])
    targets = Targets(
        rows=torch.arange(total, device=device),
        token_ids=ids,
        inv_temperature=torch.ones(total, device=device),
        min_logit=torch.full((total,), float("-inf"), device=device),
    )
    with torch.no_grad():
        model(ids, positions, PackedMetadata.from_lengths(list(map(len, tokens)), device), targets=targets)


def check_model(path: str, dtype: torch.dtype = torch.float32) -> CheckResult:
    """Reads the configuration and every weight, without keeping them; ``dtype`` must be able to hold the weights."""
    try:
        model = load_model(path, device="meta", dtype=dtype)
    except Exception as problem:  # of any class: a doctor does not crash on what it examines
        return error("model", _one_line(problem), "give a supported Hugging Face checkpoint with safetensors")
    count = sum(parameter.numel() for parameter in model.parameters())
    return ok("model", f"{model.config.architecture}, {count / 1e6:.4g} M parameters, all weights present and readable")


def check_model_memory(path: str, device: str, available: int) -> CheckResult:
    """Whether weights, gradients and optimizer state (18 bytes a parameter with the rollout's copy) fit at all."""
    config = ModelConfig.from_hf_dir(path)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CausalLM(config).parameters())
    needed = count * (20 if device == "cpu" else 18)
    text = f"training needs about {_size(needed)} without activations, {_size(available)} are free"
    if needed > available:
        return error("model memory", text, "use a smaller model, or a device with more memory")
    if needed > 0.8 * available:
        return warning("model memory", f"{text}: little is left for activations", "lower the token budgets")
    return ok("model memory", text)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def check_tokenizer(path: str) -> CheckResult:
    """For a bare ``--model_path``: the engine runs without one, training does not."""
    fix = "copy tokenizer.json and tokenizer_config.json there"
    if not has_tokenizer(path):
        return warning("tokenizer", f"no tokenizer files in {path}", fix)
    try:
        size = len(read_tokenizer(path))
    except Exception as problem:  # as above
        return error("tokenizer", _one_line(problem), fix)
    return ok("tokenizer", f"{size} tokens")


def _one_line(problem: Exception) -> str:
    text = " ".join(str(problem).split())
    return text if isinstance(problem, (ValueError, OSError)) else f"{type(problem).__name__}: {text}"
