"""Any decoder of transformers on our operators: exact, or refused by name and left as it was."""

import dataclasses

import pytest
import torch
from families import EXPERTS, LATENT, LLAMA3, ROUTERS_ARE_MODULES, bits, build
from torch import nn
from transformers import AutoModelForCausalLM

import vexact
from vexact.models import load_model
from vexact.ops import PackedMetadata
from vexact.swaps import check_operators
from vexact.swaps.invariant import KINDS, _attend, swap_modules
from vexact.swaps.operators import foreign_operators
from vexact.swaps.router import round_routers

LENGTHS = [37, 21, 1, 40, 21]
EXACT = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "phi3": {"partial_rotary_factor": 0.5},  # fused projections; half of each head is rotated
    "olmo2": {},  # norms of the branches' outputs and of all heads at once, scaled before they are rounded
    "olmo3": {},  # another rotary table for layers with a sliding window
    "gemma": {},  # 1 + weight in norms, GELU, scaled embedding
    "gemma3_text": {},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5},
    "smollm3": {},  # layers without rotary embedding
    "qwen3_moe": {**EXPERTS, "num_experts": 8, "norm_topk_prob": True},
    # weights of experts that stay fp32; an expert's width that torch's grouped product takes
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 64, "intermediate_size": 72},
}
SCORED_ALONE = {
    "glm4_moe": {  # sigmoid, groups, correction bias, shared experts
        **EXPERTS,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    # latent attention: neighbouring columns turn together, and a cache of latent vectors
    "deepseek_v3": {**EXPERTS, **LATENT, "n_group": 4, "topk_group": 2},
    "deepseek_v2": {**EXPERTS, **LATENT, "topk_method": "greedy", "norm_topk_prob": False},  # complex angles
}
EXACT |= {kind: changes for kind, changes in SCORED_ALONE.items() if ROUTERS_ARE_MODULES or kind != "deepseek_v2"}
REFUSED = {
    "gpt2": r"transformer\.drop \(Dropout\) and \d+ more drop a share of 0\.1 at random; .*"
    r"transformer\.h\.0\.ln_1 \(LayerNorm\) computes aten\.native_layer_norm \(modeling_gpt2\.py:\d+\); "
    r"transformer\.h\.0\.attn\.c_attn \(Conv1D\) computes aten\.addmm",
    "olmo": r"model\.layers\.0\.input_layernorm \(OlmoLayerNorm\) computes aten\.native_layer_norm",
    "cohere": r"CohereAttention\): its apply_rotary_pos_emb is not the rotation of pairs half a head apart",
    "gemma2": r"softcap is not supported",
    "granitemoe": r"block_sparse_moe\.router \(GraniteMoeTopK\w+\) computes aten\.",
}

pytestmark = pytest.mark.filterwarnings("ignore")


@torch.no_grad()
def packed_logits(model, ids, lengths):
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]


@torch.no_grad()
def decoded_logits(model, ids, prefill):
    """The prompt in one piece, every later token by itself from a cache."""
    out = model(input_ids=ids[None, :prefill], use_cache=True)
    rows = [out.logits[0]]
    for token in ids[prefill:]:
        out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
        rows.append(out.logits[0])
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", EXACT)
def test_a_token_has_the_bits_it_has_alone(kind, dtype):
    model = vexact.make_invariant(build(kind, dtype, **EXACT[kind]))
    ids = torch.randint(0, 97, (sum(LENGTHS),))
    packed = packed_logits(model, ids, LENGTHS)
    assert packed.dtype == torch.float32
    alone = [packed_logits(model, part, [len(part)]) for part in ids.split(LENGTHS)]
    assert torch.equal(bits(torch.cat(alone)), bits(packed))
    decoded = [decoded_logits(model, part, 5) for part in ids.split(LENGTHS)]
    assert torch.equal(bits(torch.cat(decoded)), bits(packed))
    same_length = torch.stack([ids.split(LENGTHS)[1], ids.split(LENGTHS)[4]])
    with torch.no_grad():
        batched = model(input_ids=same_length).logits
    assert torch.equal(bits(batched.flatten(0, 1)), bits(torch.cat((alone[1], alone[4]))))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - threads if threads < 3 else 1)
        assert torch.equal(bits(packed_logits(model, ids, LENGTHS)), bits(packed))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("qwen3", {"tie_word_embeddings": True}),
        ("qwen2", {"hidden_size": 80}),
        ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("qwen3_moe", EXACT["qwen3_moe"]),
        ("mixtral", EXACT["mixtral"]),
        *(
            (kind, SCORED_ALONE[kind] | changes)
            for kind, changes in (
                ("deepseek_v3", {}),
                ("deepseek_v3", {"rope_interleave": False, "q_lora_rank": None, "norm_topk_prob": False}),
                ("deepseek_v2", {}),
            )
            if kind in EXACT
        ),
    ],
)
def test_the_bits_are_those_of_our_decoder(tmp_path, kind, changes, dtype):
    build(kind, **changes).save_pretrained(tmp_path)
    ours = load_model(tmp_path, dtype=dtype)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    round_routers(theirs)
    vexact.make_invariant(theirs)
    ids = torch.randint(0, 97, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    with torch.no_grad():
        expected = ours.logits(ours(ids, positions, PackedMetadata.from_lengths(LENGTHS)))
    assert torch.equal(bits(packed_logits(theirs, ids, LENGTHS)), bits(expected))


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exchanged_is_named_and_the_model_left_as_it_was(kind):
    model = build(kind, head_dim=16, hidden_size=64, intermediate_size=96)
    ids = torch.randint(0, 97, (30,))
    before = [type(module) for module in model.modules()], model.config._attn_implementation
    logits = model(input_ids=ids[None]).logits
    with pytest.raises(ValueError, match=f"cannot be made exact: .*{REFUSED[kind]}"):
        vexact.make_invariant(model)
    assert ([type(module) for module in model.modules()], model.config._attn_implementation) == before
    assert torch.equal(model(input_ids=ids[None]).logits, logits)


@pytest.mark.parametrize("kind", SCORED_ALONE)
def test_experts_are_exchanged_where_their_choice_is_known_and_refused_elsewhere(kind):
    model = build(kind, **SCORED_ALONE[kind])
    if kind in EXACT:
        assert vexact.make_invariant(model) is model
    else:
        with pytest.raises(ValueError, match=r"cannot be made exact: .*model\.layers\.1\.mlp.* computes aten\.mm"):
            vexact.make_invariant(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"kind": "mixtral", "intermediate_size": 72, "router_jitter_noise": 0.1},
            r"model\.layers\.0\.mlp \(MixtralSparseMoeBlock\) multiplies by noise; set router_jitter_noise to 0",
        ),
        ({"attention_dropout": 0.1}, r"self_attn .* and 1 more drop a share of 0\.1 at random; set it to 0"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            r"model\.rotary_emb .* rope_type dynamic makes the angles of a token depend on the longest sequence",
        ),
    ],
)
def test_what_depends_on_chance_or_company_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        vexact.make_invariant(build(**{"kind": "llama"} | changes))


def test_models_that_cannot_be_tried_are_refused():
    with torch.device("meta"):
        model = build("llama")
    with pytest.raises(ValueError, match="on the meta device; load its weights first"):
        vexact.make_invariant(model)
    with pytest.raises(ValueError, match="Linear is no causal language model of transformers"):
        vexact.make_invariant(nn.Linear(2, 2))


def test_only_this_instance_changes(tmp_path):
    model, other = build("mistral", sliding_window=None), build("mistral", sliding_window=None)
    names, types = list(model.state_dict()), [type(module) for module in other.modules()]
    assert vexact.make_invariant(model) is model
    classes = [type(module) for module in model.modules()]
    vexact.make_invariant(model)
    assert [type(module) for module in model.modules()] == classes, "a second call does nothing"
    assert list(model.state_dict()) == names
    ids = torch.randint(0, 97, (1, 30))
    assert [type(module) for module in other.modules()] == types
    assert foreign_operators(other, lambda: other(input_ids=ids)), "the other runs torch's operators"
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=ids).logits, other(input_ids=ids).logits)


@pytest.mark.parametrize(
    "kind", ["qwen3", "gemma", "phi3", "qwen3_moe", *(kind for kind in SCORED_ALONE if kind in EXACT)]
)
def test_gradients_are_those_of_the_stock_model(kind):
    stock, ours = build(kind, **EXACT[kind]), vexact.make_invariant(build(kind, **EXACT[kind]))
    ours.gradient_checkpointing_enable()
    ids = torch.randint(0, 97, (1, 40))
    for model in (stock, ours.train()):
        model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1].gather(
            1, ids[0, 1:, None]
        ).mean().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_noticed(kind):
    """Each kind of exchange is needed: without it one of torch's operators remains, or ours refuses."""
    family = "qwen3_moe" if kind == "router" else "qwen3"
    model = build(family, **EXACT[family])
    assert not swap_modules(model, tuple(one for one in KINDS if one != kind))
    _attend(model, [])
    ids = torch.randint(0, 97, (1, 30))
    if kind in ("table", "rotary"):
        with pytest.raises((ValueError, RuntimeError), match="expected the table" if kind == "table" else "size"):
            model(input_ids=ids, use_cache=False)
        return
    found = foreign_operators(model, lambda: model(input_ids=ids, use_cache=False))
    expected = {"linear": "mm", "norm": "mean", "mlp": "silu", "router": "topk"}
    if kind == "embedding":
        assert not found, "looking rows up is exact; only its gradient has an order"
        return
    assert f"aten.{expected[kind]}" in {one.operator for one in found}
    with pytest.raises(ValueError, match=f"aten.{expected[kind]}"):
        check_operators(model, lambda: model(input_ids=ids, use_cache=False))


def test_a_module_that_is_something_else_than_it_looks_keeps_its_own_class():
    class Centred(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    class Swapped(nn.Module):
        def __init__(self, old):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = old.gate_proj, old.up_proj, old.down_proj
            self.act_fn = old.act_fn

        def forward(self, x):
            return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    model = build("llama")
    model.model.norm = Centred(60)
    with pytest.raises(
        ValueError, match=r"model\.norm \(Centred\) computes aten\.mean \(test_make_invariant\.py:\d+\)"
    ):
        vexact.make_invariant(model)
    model = build("llama")
    layer = model.model.layers[1]
    layer.mlp = Swapped(layer.mlp)
    vexact.make_invariant(model)
    assert type(layer.mlp) is Swapped
    assert type(model.model.layers[0].mlp) is not type(build("llama").model.layers[0].mlp)


def test_logits_that_become_others_are_noticed(monkeypatch):
    model = build("llama")
    monkeypatch.setattr("vexact.swaps.linear.linear", lambda x, w, b=None, **k: torch.ops.aten.add(x @ w.T, 0.5))
    monkeypatch.setattr("vexact.swaps.invariant.foreign_operators", lambda model, forward: forward())
    with pytest.raises(ValueError, match=r"its logits change by .* so an exchanged module computes something else"):
        vexact.make_invariant(model)


def test_a_sequence_longer_than_the_window_is_refused():
    model = vexact.make_invariant(build("mistral", sliding_window=16))
    packed_logits(model, torch.arange(16), [16])
    with pytest.raises(ValueError, match="sliding_window=16 is shorter than a sequence of 17 keys"):
        packed_logits(model, torch.arange(17), [17])


def test_the_pad_row_of_an_embedding_gets_no_gradient():
    for tied in (False, True):
        stock, ours = (build("llama", pad_token_id=7, tie_word_embeddings=tied) for _ in range(2))
        vexact.make_invariant(ours)
        ids = torch.tensor([[5, 7, 7, 9]])
        for model in (stock, ours):
            model(input_ids=ids).logits[..., :50].square().sum().backward()
        a, b = (model.model.embed_tokens.weight.grad for model in (stock, ours))
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)
        assert bool(b[7].any()) == tied, "only a tied head trains it"


def test_foreign_operators_name_where_they_are():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Softmax(dim=-1)

        def forward(self, x):
            return self.inner(x) + x.sum() + x.cumsum(0) + x.add(x, alpha=2)

    model = nn.Sequential(Odd())
    found = foreign_operators(model, lambda: model(torch.ones(3, 5)))
    assert {one.operator for one in found} == {"aten._softmax", "aten.sum", "aten.cumsum", "aten.add"}
    assert dataclasses.asdict(found[0])["module"] == "0.inner (Softmax)"
    assert all(one.module == "0 (Odd)" and one.source.startswith("test_make_invariant.py") for one in found[1:])
    exact = nn.Sequential(nn.ReLU())
    check_operators(exact, lambda: exact(torch.ones(3, 5)) * 2 - 1)
