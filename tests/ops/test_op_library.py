"""The operators inside torch.compile and torch.export: the bits of eager calls, one graph for all batch sizes."""

import subprocess
import sys

import pytest
import torch
from processes import PATIENCE_S
from torch._dynamo.utils import counters

from vexact.models import CausalLM, ModelConfig, Targets, random_model
from vexact.ops import PackedMetadata, PagedMetadata, SamplingTensors, library, sample

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "attention_bias": True,
}
BATCHES = ([5, 7], [3, 9, 11], [40], [2, 2, 2, 2, 60])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _model(device="cpu", dtype=torch.float32, **changes):
    model = random_model(ModelConfig.from_hf_dict(SHAPE | changes), seed=1).to(device, dtype)
    model.init_rope(device)  # its table stays fp32
    return model


def _inputs(lengths, device="cpu"):
    generator, total = torch.Generator().manual_seed(sum(lengths)), sum(lengths)
    ids, targets = torch.randint(53, (2, total), generator=generator).to(device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(device)
    rows = torch.arange(1, total, 2, device=device)
    fp32 = torch.full((len(rows),), 0.8, device=device)
    targets = Targets(rows, targets[rows], fp32, torch.full_like(fp32, -3.0))
    return ids, positions, PackedMetadata.from_lengths(lengths, device), None, targets


def _step(call, model, inputs):
    """Log-probabilities, entropies and every gradient."""
    model.zero_grad()
    scores = call(*inputs)
    (scores.logprobs.sum() + 0.1 * scores.entropy.sum()).backward()
    return [*scores, *(parameter.grad for parameter in model.parameters())]


def _compare(model: CausalLM, backend: str) -> None:
    device = model.lm_head_weight.device
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for lengths in BATCHES:
        inputs = _inputs(lengths, device)
        expected = [tensor.detach().clone() for tensor in _step(model, model, inputs)]
        for ours, theirs in zip(_step(compiled, model, inputs), expected, strict=True):
            assert torch.equal(ours, theirs), f"{backend} has other bits for sequences of {lengths}"
    assert counters["stats"]["unique_graphs"] == 1, "another batch size compiled again"


@pytest.mark.parametrize(
    "changes", [{}, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}]
)
def test_compiled_training_has_the_bits_of_eager_for_all_batch_sizes(changes):
    _compare(_model(**changes), "aot_eager")


def test_compiled_training_with_recomputation_and_bf16():
    model = _model(dtype=torch.bfloat16)
    model.recomputed_layers = len(model.layers)
    _compare(model, "aot_eager")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_on_a_gpu(backend):
    _compare(_model("cuda", torch.bfloat16), backend)


def test_the_graph_holds_launches_and_no_arithmetic_of_its_own():
    names = set()

    def note(graph, _):
        names.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    def forward(*inputs):
        return model(*inputs).logprobs

    model = _model()
    with torch.no_grad():
        torch.compile(forward, backend=note, fullgraph=True, dynamic=True)(*_inputs([4, 6]))
    assert {"vexact.linear_forward.default", "vexact.attention_packed_forward.default"} <= names
    assert not {name for name in names if any(word in name for word in ("mm", "softmax", "sum", "mean", "exp"))}


def test_a_paged_forward_compiles_too():
    """Two prompts of 5 and 3 tokens; then one more token each."""
    model, caches, meta = _model(), [], []
    for cu, used, slots in (([0, 5, 8], [5, 3], [*range(5), 8, 9, 10]), ([0, 1, 2], [6, 4], [5, 11])):
        cu, used, table = (torch.tensor(x, dtype=torch.int32) for x in (cu, used, [[0, 1], [2, 3]]))
        meta.append(PagedMetadata(cu, used, table, torch.tensor(slots), int(cu.diff().max()), int(used.max())))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    results = []
    for call in (model, compiled):
        caches = [tuple(torch.zeros(4, 4, 2, 16) for _ in range(2)) for _ in range(2)]
        ids, positions = torch.arange(10), torch.tensor([*range(5), *range(3), 5, 3])
        with torch.no_grad():
            steps = [call(ids[a:b], positions[a:b], m, caches) for a, b, m in ((0, 8, meta[0]), (8, 10, meta[1]))]
        results.append([*steps, *(cache for pair in caches for cache in pair)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-1].any()


def test_an_exported_forward_serves_other_batch_sizes():
    model = _model()

    class Exported(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, positions, cu_seqlens):
            return self.model(ids, positions, PackedMetadata(cu_seqlens, 64))

    def arguments(lengths):
        ids, positions, metadata, *_ = _inputs(lengths)
        return ids, positions, metadata.cu_seqlens

    tokens, ends = torch.export.Dim("tokens", min=2, max=512), torch.export.Dim("ends", min=2, max=64)
    program = torch.export.export(
        Exported(), arguments([5, 7]), dynamic_shapes=({0: tokens}, {0: tokens}, {0: ends})
    ).module()
    ids, positions, metadata, *_ = _inputs([3, 9, 11])
    with torch.no_grad():
        assert torch.equal(program(*arguments([3, 9, 11])), model(ids, positions, metadata))


def _arguments() -> dict[str, tuple]:
    """Small inputs of every operator."""
    torch.manual_seed(0)
    x, weight, bias, q, k = (torch.randn(*s) for s in ((6, 8), (4, 8), (4,), (6, 4, 16), (6, 2, 16)))
    cu, ids, table = torch.tensor([0, 2, 6], dtype=torch.int32), torch.arange(6) % 4, torch.rand(9, 16)
    out, lse = library.attention_packed_forward(q, k, k, cu, cu, 4, 4, 0.25, True)
    head = (x, weight, ids, torch.ones(6), torch.full((6,), -9.0))
    logprobs, lse_of_head, entropy = library.linear_cross_entropy_forward(*head)
    pages = torch.zeros(4, 4, 2, 16)
    spread = torch.tensor([0, 1, 4, 5, -1, 7])
    logits, digest = torch.randn(6, 8), torch.zeros(6, dtype=torch.int64)
    routing = 2, "sigmoid", 4, 2, True, 2.5, torch.float32, 7
    experts, expert_weights = library.moe_router_forward(logits, None, None, *routing)
    places, slots, offsets = library.moe_groups_forward(experts, 8)
    matrices, pairs = torch.randn(8, 4, 8), torch.randn(12, 8)
    used, blocks = torch.tensor([2, 4], dtype=torch.int32), torch.tensor([[0], [1]], dtype=torch.int32)
    return {
        "linear_forward": (x, weight, bias, torch.float32),
        "linear_grad_input": (torch.randn(6, 4), weight),
        "linear_grad_weight": (torch.randn(6, 4), x),
        "linear_grad_bias": (torch.randn(6, 4),),
        "rms_norm_forward": (x, torch.rand(8), 1e-6),
        "rms_norm_add_forward": (x, x.flip(0), torch.rand(8), 1e-6),
        "rms_norm_backward": (x.flip(0), x, torch.rand(8), torch.rand(6)),
        "rope_forward": (q, k, ids, table, False),
        "qk_norm_rope_forward": (q, k, torch.rand(16), torch.rand(16), 1e-6, ids, table),
        "rope_to_cache_forward": (q, k, k + 1, None, None, 0.0, ids, table, pages, pages + 1, spread),
        "latent_rope_forward": (q, torch.randn(6, 4, 12), torch.randn(6, 4), ids, table[:, :4], True),
        "swiglu_forward": (x,),
        "linear_swiglu_forward": (x, weight),
        "swiglu_backward": (torch.randn(6, 4), x),
        "embedding_forward": (ids, weight),
        "embedding_backward": (x, ids, 4),
        "attention_packed_forward": (q, k, k.flip(0), cu, cu, 4, 4, 0.25, True),
        "attention_packed_backward": (q, q, k, k, out, lse, cu, cu, 4, 4, 0.25, True),
        "attention_paged_forward": (q, pages, pages + 1, cu, used, blocks, 4, 4, 0.25, True),
        "attention_write_kv": (k, k + 1, pages, pages + 1, spread),
        "linear_cross_entropy_forward": head,
        "linear_cross_entropy_backward": (logprobs, None, *head, lse_of_head, entropy),
        "moe_router_forward": (logits, torch.randn(8), digest, *routing),
        "moe_router_grouped_forward": (logits, None, digest, torch.arange(6) > 4, *routing),
        "moe_router_backward": (expert_weights, logits, experts, 2, "sigmoid", True, 2.5),
        "moe_groups_forward": (experts, 8),
        "moe_grouped_linear_forward": (x, matrices, places, offsets, 2),
        "moe_grouped_linear_swiglu_forward": (x, matrices, places, offsets, 2),
        "moe_grouped_linear_grad_input": (torch.randn(12, 4), matrices, offsets),
        "moe_grouped_linear_grad_weight": (torch.randn(12, 4), x, places, offsets, 2),
        "moe_combine_forward": (pairs, expert_weights, slots, x),
        "moe_combine_total": (pairs, slots),
        "moe_combine_backward": (x, pairs, expert_weights, slots),
    }


@pytest.mark.parametrize("name", _arguments())
def test_schema_and_shapes_hold(name):
    torch.library.opcheck(getattr(library, name), _arguments()[name])


def test_every_launch_is_checked():
    names = {op._name.removeprefix("vexact::") for space in library.OPS.values() for op in vars(space).values()}
    assert names == set(_arguments())


def test_what_cannot_be_captured_says_so():
    def draw(logits):
        zeros = torch.zeros(2, dtype=torch.int64)
        return sample(logits, SamplingTensors(*(torch.ones(2),) * 4, zeros, zeros)).token_ids

    with pytest.raises(Exception, match="sampling cannot be part of a compiled graph"):
        torch.compile(draw, backend="eager", fullgraph=True)(torch.zeros(2, 5))


def test_eager_calls_register_nothing():
    code = (
        "import sys, torch, vexact.models; from vexact.ops import linear; "
        "linear(torch.ones(2, 4), torch.ones(3, 4)); assert 'vexact.ops.library' not in sys.modules; "
        "assert not hasattr(torch.ops.vexact, 'linear_forward')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")
