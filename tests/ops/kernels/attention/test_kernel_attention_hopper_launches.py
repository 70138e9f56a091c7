"""Launches of the warp-specialised kernels: what decides one, what is handed over again, and, on a GPU, the bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_inputs import cumulative, make_batch, make_pages, same_bits
from hopper_inputs import LATENT, on_a_hopper
from releases import handed_over
from torch import Tensor
from triton.runtime.jit import JITFunction

from vexact.ops.kernels.attention import packed_backward, packed_forward, paged_forward
from vexact.ops.kernels.attention.hopper import counters, host
from vexact.ops.kernels.attention.hopper.backward import host as backward
from vexact.ops.kernels.attention.hopper.backward.host import Walk
from vexact.ops.kernels.attention.hopper.host import ForwardTile
from vexact.ops.kernels.attention.launch import form
from vexact.ops.kernels.launches import forget

_SCRIPT = Path(__file__).with_name("hopper_release.py")


def test_the_installed_triton_is_handed_what_its_own_launch_hands_over(tmp_path: Path) -> None:
    calls = handed_over(_SCRIPT, tmp_path)
    assert len(calls) == 7
    for call in calls:
        first, second = call["first"], call["second"]
        launches = 2 if call["name"].startswith("backward") else 1
        assert (first["triton"], second["triton"]) == (launches, 0), call["name"]
        assert len(first["handed"]) == launches
        assert second["handed"] == first["handed"], call["name"]


class Noted:
    """Stands for a kernel that is not launched. It has no JIT function, so keys are held against calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **constants: self.calls.append((grid, args, constants))


def tensors(rows: int, keys: int, heads: tuple[int, int], dims: tuple[int, int], gap: int) -> tuple[Tensor, ...]:
    """q, k and v, with columns between the heads that are none of theirs."""
    sizes = (rows, heads[0], dims[0]), (keys, heads[1], dims[0]), (keys, heads[1], dims[1])
    return tuple(torch.zeros(*size[:2], size[2] + gap, dtype=torch.bfloat16)[..., : size[2]] for size in sizes)


HEADS = ((4, 2), (2, 2))
DIMS = ((64, 64), (128, 128), LATENT)


def packed_calls() -> Iterator[dict[str, Any]]:
    for rows, keys, heads, dims, gap in product((70, 200), (70, 300), HEADS, DIMS, (0, 8)):
        for count, scale, causal, same in product((1, 3), (0.1, 0.2), (True, False), (True, False)):
            q, k, v = tensors(rows, keys, heads, dims, gap)
            q_lens = torch.zeros(count + 1, dtype=torch.int32)
            lengths = (q_lens, q_lens if same else q_lens.clone())
            yield {"rows": (q, k, v), "lengths": lengths, "scale": scale, "causal": causal}


def test_no_key_of_the_forward_stands_for_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Noted()
    monkeypatch.setattr(host, "forward_kernel", kernel)
    for call in packed_calls():
        q, k, v = call["rows"]
        out, lse = q.new_empty(*q.shape[:2], v.shape[-1]), torch.empty(q.shape[:2])
        for chunk in (0, 2048):
            last = *call["lengths"], call["scale"], chunk, call["causal"]
            assert host.launch_forward(form(q, k, v), q, k, v, out, lse, *last)
    assert len(kernel.calls) == 48 * 16 * 2
    monkeypatch.setitem(host.FORWARD_TILES, (2, 192), ForwardTile(64, True))  # the last call again
    assert host.launch_forward(form(q, k, v), q, k, v, out, lse, *last)


def test_no_key_of_the_forward_over_pages_stands_for_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Noted()
    monkeypatch.setattr(host, "forward_kernel", kernel)
    for rows, heads, dims, gap in product((70, 200), HEADS, DIMS, (0, 8)):
        q, k, v = tensors(rows, 192, heads, dims, gap)
        out, lse = q.new_empty(*q.shape[:2], dims[1]), torch.empty(q.shape[:2])
        for page_size, count, width, chunk, skip_up_to in product((16, 64), (1, 3), (5, 7), (0, 2048), (0, 1)):
            caches = (rows.unflatten(0, (-1, page_size)) for rows in (k, v))
            lengths = [torch.zeros(size, dtype=torch.int32) for size in ((count + 1,), (count,), (count, width))]
            given = q, *caches
            for scale, causal in ((0.1, True), (0.2, True), (0.1, False)):
                last = tuple(lengths), scale, chunk, causal, skip_up_to
                assert host.launch_paged(form(*given), *given, out, lse, *last)
    assert len(kernel.calls) == 24 * 32 * 3


def test_no_key_of_the_backward_stands_for_two_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Noted(), Noted()
    monkeypatch.setattr(backward, "queries_kernel", kernels[0])
    monkeypatch.setattr(backward, "keys_kernel", kernels[1])
    for call in packed_calls():
        q, k, v = rows = call["rows"]
        dout, statistics = q.new_empty(*q.shape[:2], v.shape[-1]), [torch.empty(q.shape[1], q.shape[0]) for _ in "ab"]
        for softmax_scale, walk in ((0.1, Walk(64, 4)), (0.2, Walk(64, 4)), (0.1, Walk(64, 3, False))):
            scales = call["scale"], softmax_scale, call["causal"]
            given = backward.Inputs(form(q, k, v), dout, *rows, *statistics, *call["lengths"], *scales)
            dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in rows)
            assert backward.launch_queries(given, dq, walk)
            assert backward.launch_keys(given, dk, dv, walk)
    assert len(kernels[0].calls) == len(kernels[1].calls) == 48 * 16 * 3


def test_rows_that_cannot_be_described_are_refused_after_others_were_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Noted()
    monkeypatch.setattr(host, "forward_kernel", kernel)
    rows = tensors(70, 70, (4, 2), (64, 64), 0)
    lengths = torch.tensor([0, 70], dtype=torch.int32)
    last = torch.empty(70, 4, 64), torch.empty(70, 4), lengths, lengths, 0.1, 0, True
    assert host.launch_forward(form(*rows), *rows, *last)
    shifted = torch.zeros(70 * 4 * 64 + 8, dtype=torch.bfloat16)[4:-4].view(70, 4, 64)  # 8 bytes off
    given = shifted, *rows[1:]
    assert form(*given) is form(*rows)
    assert not host.launch_forward(form(*given), *given, *last)
    assert len(kernel.calls) == 1


def test_counters_are_zeros_that_no_other_launch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of them for every stream; a captured launch has one that its graph makes."""
    made: list[Any] = []
    now = SimpleNamespace(stream=1, capturing=False)

    def zeros(size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        made.append((size, now.stream))
        return torch.zeros(size, dtype=dtype)

    cuda = SimpleNamespace(is_current_stream_capturing=lambda: now.capturing)
    monkeypatch.setattr(counters, "torch", SimpleNamespace(zeros=zeros, int32=torch.int32, cuda=cuda))
    active = SimpleNamespace(get_current_stream=lambda device: now.stream)
    monkeypatch.setattr(counters, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(counters, "_zeros", {})
    device = torch.device("cuda", 0)
    taken = []
    for _ in range(300):
        for now.stream in (1, 2):
            taken.append(counters.new_counter(device))
    assert len(made) == 4
    assert [stream for _, stream in made] == [1, 2, 1, 2]
    now.capturing = True
    taken += [counters.new_counter(device) for _ in range(3)]
    assert [size for size, _ in made[4:]] == [1, 1, 1]
    assert len({counter.data_ptr() for counter in taken}) == len(taken)
    assert not any(counter.data_ptr() % 16 or counter.any() for counter in taken)
    now.capturing = False
    counters.new_counter(device)
    assert len(made) == 7


Results = tuple[Tensor, ...]


def all_passes(dims: tuple[int, int], lengths: list[int], seed: int) -> Callable[[], Results]:
    """A call that gives out and lse of packed rows and of pages, and the gradients, by the kernels of `hopper`."""
    batch = make_batch(lengths, lengths, heads=(4, 2), dims=dims, seed=seed)
    pages, cu, longest = make_pages(batch, 16), cumulative(lengths), (max(lengths),) * 2
    used = torch.tensor(lengths, dtype=torch.int32, device=cu.device)
    rest = cu, cu, *longest, batch.scale, True
    dout = make_batch(lengths, lengths, heads=(4, 2), dims=dims[::-1], seed=seed + 1).q

    def run() -> Results:
        out, lse = packed_forward(batch.q, batch.k, batch.v, *rest, specialised=True)
        rows = batch.q, pages.k_cache, pages.v_cache
        lengths = cu, used, pages.table
        paged = paged_forward(*rows, *lengths, *longest, batch.scale, True, specialised=True)
        gradients = packed_backward(dout, batch.q, batch.k, batch.v, out, lse, *rest, specialised=True)
        return out, lse, *paged, *gradients

    return run


BATCHES = ([300, 64, 1, 65, 127], [512], [2300, 130])


@on_a_hopper
@pytest.mark.parametrize("dims", [(128, 128), LATENT])
def test_repeated_launches_give_the_bits_of_first_ones(dims):
    """At other addresses, since all tensors are kept, and between launches of other sizes."""
    forget()
    calls = [all_passes(dims, lengths, seed) for seed in (0, 10, 20) for lengths in BATCHES]
    repeated = [call() for call in calls]
    for call, given in zip(calls, repeated, strict=True):
        forget()
        assert same_bits(given, call())


@on_a_hopper
@pytest.mark.parametrize("dims", [(128, 128), LATENT])
def test_launches_are_in_fact_repeated(dims):
    """This release of Triton is understood: the second launch of a kind is not Triton's."""
    call = all_passes(dims, [2300, 130], 0)
    expected = call()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an ordinary launch")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(JITFunction, "run", refuse)
        assert same_bits(call(), expected)


@on_a_hopper
def test_launches_that_overlap_on_streams_do_not_draw_from_each_other():
    """More of them than a block has counters."""
    calls = [all_passes((128, 128), lengths, seed) for seed, lengths in enumerate((*BATCHES, [700, 1]))]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    given = []
    for _ in range(70):
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                given.append(call())
    torch.cuda.synchronize()
    for index, results in enumerate(given):
        assert same_bits(results, expected[index % len(calls)])


@on_a_hopper
def test_graphs_replay_beside_each_other_and_beside_launches():
    calls = [all_passes((128, 128), lengths, seed) for seed, lengths in enumerate((*BATCHES, [700, 1]))]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    graphs, captured = [], []
    for call in calls[1:]:
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            captured.append(call())
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(20):
        for results in captured:
            for tensor in results:
                tensor.zero_()
        torch.cuda.synchronize()
        for graph, stream in zip(graphs, streams[1:], strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[0]):
            eager = calls[0]()
        torch.cuda.synchronize()
        for given, right in zip((eager, *captured), expected, strict=True):
            assert same_bits(given, right)
