"""`vexact verify --explain` and `--replay`."""

import pytest

from vexact.cli import main
from vexact.models import ModelConfig, random_model, save_hf
from vexact.ops import sample
from vexact.rollout.sampling import sampler

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


@pytest.fixture
def checkpoint(tmp_path):
    config = ModelConfig.from_hf_dict(CONFIG)
    save_hf(random_model(config, seed=3).named_parameters(), config, tmp_path / "model")
    return tmp_path / "model"


def test_a_stock_attention_in_the_trainer_is_named_and_repeated(checkpoint, tmp_path, capsys):
    file = tmp_path / "divergence.pt"
    command = ["verify", f"--model_path={checkpoint}", "--attn_impl=sdpa", "--num_prompts=4", "--max_new_tokens=4"]
    assert main([*command, "--device=cpu", f"--explain={file}"]) == 1
    shown = capsys.readouterr().out
    assert "first divergence: operator: attention of layers." in shown
    trainer = next(line for line in shown.splitlines() if line.startswith("  trainer "))
    assert "differs from vexact.ops.attention" in trainer
    assert main(["verify", f"--replay={file}"]) == 1
    again = capsys.readouterr().out
    assert "reproduced: same place as recorded" in again
    assert trainer in again


def test_a_draw_that_alone_differs_is_explained(checkpoint, tmp_path, capsys, monkeypatch):
    """Every log-probability is true, of tokens that other seeds gave."""
    monkeypatch.setattr(sampler, "sample", lambda logits, params: sample(logits, params._replace(seed=params.seed + 1)))
    file = tmp_path / "divergence.pt"
    command = ["verify", f"--model_path={checkpoint}", "--num_prompts=4", "--max_new_tokens=4", "--device=cpu"]
    assert main([*command, f"--explain={file}"]) == 1
    shown = capsys.readouterr().out
    assert "first different draw" in shown
    assert (
        "first divergence: sampling: the sampler draws another token than its logits, seed and position give" in shown
    )
    assert file.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model_path=x", "--model_backend=hf", "--explain"], "--model_backend=hf has no counterparts"),
        ([], "--model_path is missing"),
        (["--replay={junk}"], "is not a replay file"),
        (["--replay={junk}", "--out=x.json", "--seed=3"], "takes no other option than --model_path: --seed, --out"),
        (["--model_path=x", "--out={junk}.new", "--explain={junk}.new"], "both write to"),
    ],
)
def test_what_cannot_be_explained_is_refused(arguments, says, tmp_path, capsys):
    junk = tmp_path / "junk.pt"
    junk.write_text("no replay file")
    assert main(["verify", *(text.format(junk=junk) for text in arguments)]) == 2
    assert says in capsys.readouterr().err
