"""The same on a GPU, where every operator is a kernel: alone, packed, decoded and in our decoder."""

import pytest
import torch
from families import bits, build
from transformers import AutoModelForCausalLM

import vexact
from vexact.models import load_model
from vexact.ops import PackedMetadata

LENGTHS = [65, 200, 1, 33]
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 352,
    "head_dim": 64,
    "vocab_size": 515,
    "max_position_embeddings": 512,
}

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]


@torch.no_grad()
def packed_logits(model, ids, lengths):
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    return model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "phi3", "olmo2", "gemma", "gemma3_text", "smollm3"]
)
def test_a_token_has_the_bits_it_has_alone(kind):
    model = vexact.make_invariant(build(kind, torch.bfloat16, **SHAPE).cuda())
    ids = torch.randint(0, 515, (sum(LENGTHS),), device="cuda")
    packed = packed_logits(model, ids, LENGTHS)
    alone = [packed_logits(model, part, [len(part)]) for part in ids.split(LENGTHS)]
    assert torch.equal(bits(torch.cat(alone)), bits(packed))
    with torch.no_grad():
        part, rows = ids.split(LENGTHS)[3], []
        out = model(input_ids=part[None, :5], use_cache=True)
        rows.append(out.logits[0])
        for token in part[5:]:
            out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0])
    assert torch.equal(bits(torch.cat(rows)), bits(alone[3]))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_the_bits_are_those_of_our_decoder(tmp_path, kind):
    build(kind, **SHAPE).save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=torch.bfloat16, device="cuda")
    theirs = vexact.make_invariant(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).cuda())
    ids = torch.randint(0, 515, (sum(LENGTHS),), device="cuda")
    positions = torch.cat([torch.arange(n, device="cuda") for n in LENGTHS])
    with torch.no_grad():
        expected = ours.logits(ours(ids, positions, PackedMetadata.from_lengths(LENGTHS, "cuda")))
    assert torch.equal(bits(packed_logits(theirs, ids, LENGTHS)), bits(expected))
