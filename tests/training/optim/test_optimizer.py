"""Norm and AdamW step: the bits of a number depend neither on where it lies nor on where the moments are."""

import itertools
import math
import warnings

import pytest
import torch
from torch.nn import Parameter
from training_support import tiny_actor

from vexact.training import OptimConfig
from vexact.training.batches.batch import TokenSequence, pack_tokens
from vexact.training.optim import offload as offload_module
from vexact.training.optim.adamw import adamw_step
from vexact.training.optim.host_memory import host_rows, pieces
from vexact.training.optim.norm import total_norm
from vexact.training.optim.offload import Parked
from vexact.training.optim.optimizer import Optimizer
from vexact.training.parallel.ranks import Ranks
from vexact.training.passes.forward import token_scores

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.05)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


def stepped(sizes, device, steps=3):
    """Weights and moments of one vector after some steps, cut into ``sizes`` at addresses of every alignment."""
    total = sum(sizes)
    columns = [random(total + 3, seed=seed, device=device) for seed in range(3)]
    columns += [random(total + 3, seed=3, device=device).square()]
    offsets = (0, 1, 2, 3) if len(sizes) > 1 else (0,) * 4
    whole = [column[:total].clone() for column in columns]
    moved = [torch.empty(total + 3, device=device)[offset:] for offset in offsets]
    for there, here in zip(moved, whole, strict=True):
        there[:total] = here
    parts = [list(column[:total].split(sizes)) for column in moved]
    for step in range(1, steps + 1):
        adamw_step(*parts, step, 1e-2, CONFIG)
    return [torch.cat(part) for part in (parts[0], *parts[2:])]


@pytest.mark.parametrize("device", DEVICES)
def test_an_element_is_updated_alike_in_a_shard_of_any_size_and_address(device):
    lengths = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 1001, 4097, 33333, 70000]
    expected = stepped([sum(lengths)], device)
    for cut in (lengths, lengths[::-1], [1] * 37 + [sum(lengths) - 37], [sum(lengths) - 37] + [1] * 37):
        for ours, theirs in zip(stepped(cut, device), expected, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_the_step_is_adamw(device):
    weight = Parameter(random(501, device=device))
    reference = torch.optim.AdamW(
        [Parameter(weight.detach().double())], lr=CONFIG.lr, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.05
    )
    optimizer = Optimizer([weight], CONFIG)
    (wide,) = reference.param_groups[0]["params"]
    for step in range(4):
        weight.grad = random(501, seed=step, device=device)
        wide.grad = weight.grad.double()
        expected = wide.grad.norm().item()
        assert optimizer.step(2.0) == pytest.approx(expected, rel=1e-6)
        wide.grad *= min(1.0, 2.0 / expected)
        reference.step()
    torch.testing.assert_close(weight.detach().double(), wide.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_the_norm_has_the_same_bits_on_any_device(device):
    shapes = [(40, 33), (7,), (1, 1), (300, 1), (5, 3, 4), (3, 5000), (2, 0)]
    gradients = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
    expected = total_norm(gradients, Ranks(None, torch.device("cpu")))
    exact = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
    assert expected == pytest.approx(exact, rel=1e-6)
    moved = [gradient.to(device) for gradient in gradients]
    assert total_norm(moved, Ranks(None, torch.device(device))) == expected
    assert total_norm(moved[-1:], Ranks(None, torch.device(device))) == total_norm([], Ranks(None, device)) == 0
    moved[0][3, 4] = 1e30  # its square is infinite
    assert total_norm(moved, Ranks(None, torch.device(device))) == math.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("piece", [64, 1 << 24])
def test_moments_on_the_host_change_no_bit(device, piece, monkeypatch):
    monkeypatch.setattr(offload_module, "_PIECE", piece)
    shapes = [(37, 11), (5,), (64, 64)]
    results = []
    for offload in (False, True):
        weights = [Parameter(random(*shape, seed=i, device=device)) for i, shape in enumerate(shapes)]
        optimizer = Optimizer(weights, CONFIG, offload=offload)
        for step in range(3):
            for i, weight in enumerate(weights):
                weight.grad = random(*shapes[i], seed=10 * step + i, device=device)
            optimizer.step(1.0)
        moments = [optimizer.state_of(weight) for weight in weights]
        state = [(m.exp_avg, m.exp_avg_sq) for m in moments]
        if offload:
            assert all(moment.device.type == "cpu" for moment in itertools.chain(*state))
            largest = max(moment.max().item() for _, moment in state)
            assert max(seen[1].item() for seen in optimizer.second_moments()) == largest
        results.append([*(w.detach().cpu() for w in weights), *(m.cpu() for m in itertools.chain(*state))])
    for resident, offloaded in zip(*results, strict=True):
        assert torch.equal(resident, offloaded)


def test_a_restored_optimizer_begins_its_offloaded_moments_anew():
    weight, frozen = Parameter(random(3, 4)), Parameter(random(5), requires_grad=False)
    optimizer = Optimizer([weight, frozen], CONFIG, offload=True)
    weight.grad = random(3, 4, seed=1)
    optimizer.step(1.0)
    first = optimizer.state_of(weight).exp_avg.clone()
    optimizer.restore(frozen, random(5, seed=2), random(5, seed=3).abs(), 7)
    assert torch.equal(optimizer.state_of(weight).exp_avg, first), "another's moments are not touched"
    assert torch.equal(optimizer.state_of(frozen).exp_avg, random(5, seed=2))
    optimizer.forget()
    weight.grad = random(3, 4, seed=1)
    optimizer.step(1.0)
    assert torch.equal(optimizer.state_of(weight).exp_avg, first), "as after the first step"
    assert optimizer.state_of(weight).num_steps == 1


@pytest.mark.parametrize("device", DEVICES)
def test_moments_that_are_read_for_an_offloading_optimizer_are_not_copied(device):
    """Nor lost, where the memory is the optimizer's own already; one that has moments gives none of its memory away."""
    weights = [Parameter(random(*shape, device=device)) for shape in ((37, 11), (0, 4), (64, 64))]
    optimizer, plain = Optimizer(weights, CONFIG, offload=True), Optimizer(weights, CONFIG)
    for seed in (1, 5):
        kept = [[values.clone() for values in moments_of(optimizer, weight)] for weight in weights]
        for weight, read in zip(weights, optimizer.blank_moments(weights), strict=True):
            read[0].copy_(random(*weight.shape, seed=seed))
            read[1].copy_(random(*weight.shape, seed=seed + 1).square())
        for weight, before in zip(weights, kept, strict=True):
            assert all(map(torch.equal, moments_of(optimizer, weight), before)), "read, and not given back yet"
        given = optimizer.blank_moments(weights)
        if seed == 1:
            held = [[part.data_ptr() for part in parts] for parts in given]
        for weight, parts in zip(weights, given, strict=True):
            parts[0].copy_(random(*weight.shape, seed=seed))
            parts[1].copy_(random(*weight.shape, seed=seed + 1).square())
        optimizer.forget()
        for weight, parts in zip(weights, given, strict=True):
            optimizer.restore(weight, *parts, 3)
            plain.restore(weight, *parts, 3)
        for weight, addresses in zip(weights, held, strict=True):
            found = moments_of(optimizer, weight)
            assert [part.data_ptr() for part in found] == addresses
            assert torch.equal(found[0], random(*weight.shape, seed=seed))
            assert torch.equal(found[1], random(*weight.shape, seed=seed + 1).square())
            assert all(torch.equal(ours.cpu(), other.cpu()) for ours, other in zip(found, moments_of(plain, weight)))
            assert optimizer.state_of(weight).num_steps == 3


def test_what_was_read_and_refused_leaves_no_moments():
    weight = Parameter(random(3, 4))
    used, untouched = Optimizer([weight], CONFIG, offload=True), Optimizer([weight], CONFIG, offload=True)
    for part in used.blank_moments([weight])[0]:
        part.fill_(torch.nan)
    found = []
    for optimizer in (used, untouched):
        assert optimizer.state_of(weight) is None
        weight.grad = random(3, 4, seed=1)
        optimizer.step(1.0)
        found.append(moments_of(optimizer, weight))
    assert all(map(torch.equal, *found))


def moments_of(optimizer, parameter):
    state = optimizer.state_of(parameter)
    return [] if state is None else [state.exp_avg, state.exp_avg_sq]


MIB = 1 << 20


@pytest.mark.parametrize(
    "sizes", [[], [0], [1], [5, 0, 600, 512], [2050 * MIB], [9 << 30, 3], [700 * MIB] * 13, [3, 4096 * MIB, 4]]
)
def test_pieces_keep_the_order_and_are_as_large_as_they_may_be(sizes):
    found = pieces(sizes)
    assert list(itertools.chain(*found)) == sizes
    room = [[-(-size // 512) * 512 for size in piece] for piece in found]
    assert all(sum(piece) <= 1 << 32 or len(piece) == 1 for piece in room)
    assert all(sum(piece) + after[0] > 1 << 32 for piece, after in itertools.pairwise(room))


def test_tensors_share_host_memory_without_overlap():
    like = [random(7, 3), torch.zeros(5, dtype=torch.bfloat16), random(0, 4), random(2, 300)]
    rows = host_rows(like)
    for number, each in enumerate(rows):
        each.fill_(number)
    for number, (each, source) in enumerate(zip(rows, like, strict=True)):
        assert (each.shape, each.dtype, each.is_contiguous()) == (source.shape, source.dtype, True)
        assert (each == number).all()
    assert len({each.untyped_storage().data_ptr() for each in rows if each.numel()}) < 3


@pytest.mark.parametrize("device", DEVICES)
def test_parked_tensors_keep_values_views_and_identity_and_give_their_memory_back(device):
    tensors = [random(100, 7, device=device), random(1 << 20, seed=1, device=device), torch.empty(0, 3, device=device)]
    tensors.append(tensors[0][10:20])  # shares a storage
    before, view = [tensor.cpu().clone() for tensor in tensors], tensors[1][5:]
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    parked = Parked(tensors, enabled=True)
    assert tensors[1].untyped_storage().size() == 0
    if device == "cuda":
        assert torch.cuda.memory_allocated() <= held - (4 << 20)
    for rows, expected in zip(parked.rows(), before, strict=True):
        assert rows.device.type == "cpu"
        assert torch.equal(rows, expected)
    with parked.resident(), parked.resident():
        assert torch.equal(view.cpu(), before[1][5:])
        tensors[0][12, 0] = 5.0
    assert tensors[0].untyped_storage().size() == 0
    assert parked.rows()[3][2, 0] == 5.0


@pytest.mark.gpu
def test_a_step_waits_for_the_device_once():
    weights = [Parameter(random(*shape, device="cuda")) for shape in [(300, 70), (40,), (9, 5000)]]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = Optimizer(weights, CONFIG)
    optimizer.step(1.0)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            optimizer.step(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ["synchronizing CUDA operation" in str(wait.message) for wait in waits] == [True]


def test_parked_tensors_that_do_not_fit_stay_on_the_host(monkeypatch):
    tensors = [random(10), random(20)]
    parked = Parked(tensors, enabled=True)

    def full(storage):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(offload_module, "_bytes", full)
        with pytest.raises(MemoryError):
            parked.resident().__enter__()
    assert [tensor.untyped_storage().size() for tensor in tensors] == [0, 0]
    with parked.resident():
        assert torch.equal(tensors[1], random(20))


def test_a_model_whose_weights_are_away_refuses_to_compute():
    actor = tiny_actor(param_offload=True)
    batch = pack_tokens([TokenSequence((1, 2), (3,))])
    with pytest.raises(RuntimeError, match=r"weights are in host memory \(param_offload\)"):
        token_scores(actor.model, batch)
    with actor.resident():
        inside = token_scores(actor.model, batch).logprobs
    assert torch.equal(inside, token_scores(tiny_actor().model, batch).logprobs)


def test_what_is_not_parked_stays_where_it_is():
    tensor = random(4)
    parked = Parked([tensor], enabled=False)
    with parked.resident():
        pass
    assert parked.rows()[0].data_ptr() == tensor.data_ptr()
