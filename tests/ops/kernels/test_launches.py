"""Repeated launches: what the C function is handed, and when Triton has to launch instead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from releases import handed_over
from rowwise import DEVICE, randn, same_bits
from torch import Tensor
from triton import knobs
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from vexact.ops.kernels import launches, linear, rms_norm, swiglu
from vexact.ops.kernels.launches import Call, Launches
from vexact.ops.kernels.rotary import rope_to_cache

STREAM = 77
FUNCTION = 4242


class PyCUtensorMap:
    """As the driver module of Triton has it: opaque."""

    def __init__(self, *said: Any) -> None:
        self.said = said


def make_tensordesc_arg(descriptor: Any, metadata: Any) -> list[Any]:
    said = descriptor.base.data_ptr(), tuple(descriptor.block_shape), metadata["swizzle"]
    return [PyCUtensorMap(*said), *descriptor.shape, *descriptor.strides]


class CFunction:
    """Takes what is handed to the device."""

    def __init__(self, handed: list[Any]) -> None:
        self.handed = handed

    def __call__(self, *args: Any) -> None:
        self.handed.append(args)


class Launcher:
    """The launcher that Triton keeps with a kernel, of its older (flat) and newer (nested) kind."""

    def __init__(self, handed: list[Any], metadata: list[dict[str, int]], nested: bool) -> None:
        self.nested = nested

        launcher = CFunction(handed)

        def inner(*args: Any) -> None:
            kept, own = (args[:-1], args[-1]) if nested else (args[:8], args[8:])
            final, rest = [], iter(metadata)
            for arg in own:
                described = isinstance(arg, (TensorDescriptor, GluonDescriptor))
                final += make_tensordesc_arg(arg, next(rest)) if described else [arg]
            launcher(*kept, final) if nested else launcher(*kept, *final)

        self.launch = inner if metadata else launcher

    def __call__(self, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
        packed, own = args[0], args[4:]
        if self.nested:
            self.launch(x, y, z, stream, function, packed, None, "signature", own)
        else:
            self.launch(x, y, z, stream, function, packed, None, None, *own)


class Kernel(JITFunction):
    """Counts ordinary launches; what it is compiled to is handed to ``handed``."""

    def __init__(self, names: list[str], metadata: list[dict[str, int]], nested: bool) -> None:
        self.arg_names, self.pre_run_hooks, self.ordinary, self.handed = names, [], 0, []
        self.compiled = SimpleNamespace(
            run=Launcher(self.handed, metadata, nested),
            function=FUNCTION,
            packed_metadata=(4, 1, 0),
            hash="of this kernel",
            metadata=SimpleNamespace(global_scratch_size=0, profile_scratch_size=0, tensordesc_meta=metadata),
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> Any:
            self.ordinary += 1
            return self.compiled

        return launch


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tensors on the CPU are those of the current device."""
    if request.node.get_closest_marker("gpu"):
        return
    active = SimpleNamespace(get_current_device=lambda: -1, get_current_stream=lambda device: STREAM)
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=active))


def plain(kernel: Kernel, x: Tensor, y: Tensor, scale: int = 3) -> Call:
    return Call(kernel, (2, 5), (x, y, x, scale), {"BLOCK": 16, "num_warps": 4})


def own_arguments(call: tuple[Any, ...], nested: bool) -> list[Any]:
    return list(call[-1] if nested else call[8:])


@pytest.mark.parametrize("nested", [False, True])
def test_the_second_launch_hands_over_other_addresses(nested: bool) -> None:
    kernel, call = Kernel(["x", "y", "again", "scale", "BLOCK"], [], nested), Launches()
    for _ in range(3):
        x, y = torch.zeros(8), torch.zeros(8)
        call("key", (x, y), lambda x=x, y=y: plain(kernel, x, y))
    assert kernel.ordinary == 1
    assert len(kernel.handed) == 2
    last = kernel.handed[-1]
    assert last[:6] == (2, 5, 1, STREAM, FUNCTION, (4, 1, 0))
    assert own_arguments(last, nested) == [x.data_ptr(), y.data_ptr(), x.data_ptr(), 3, 16]


def in_gluon(rows: Tensor, box: list[int]) -> GluonDescriptor:
    return GluonDescriptor.from_tensor(rows, box, NVMMASharedLayout(32, 32, rank=2))


@pytest.mark.parametrize("describe", [TensorDescriptor.from_tensor, in_gluon])
@pytest.mark.parametrize("nested", [False, True])
def test_descriptors_are_made_once_for_an_address_and_a_form(
    nested: bool, describe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = make_tensordesc_arg

    def counted(descriptor: Any, metadata: Any) -> list[Any]:
        made.append(descriptor.base.data_ptr())
        return make(descriptor, metadata)

    monkeypatch.setitem(globals(), "make_tensordesc_arg", counted)
    kernel, call = Kernel(["w", "x", "rows", "BLOCK"], [{"swizzle": 3}], nested), Launches()
    weights = [torch.zeros(16, 8), torch.zeros(16, 8)]

    def run(key: str, weight: Tensor, rows: int) -> tuple[Tensor, list[Any]]:
        x = torch.zeros(rows, 8)
        described = describe(weight.t().t(), [4, 8])
        call(key, (weight, x), lambda: Call(kernel, (1,), (described, x, rows), {"BLOCK": 4}))
        return x, own_arguments(kernel.handed[-1], nested) if kernel.handed else []

    run("4 rows", weights[0], 4)
    before = len(made)
    for weight in (*weights, *weights):
        x, (described, *others) = run("4 rows", weight, 4)
        assert described.said == (weight.data_ptr(), (4, 8), 3)
        assert others == [16, 8, 8, 1, x.data_ptr(), 4, 4]
    assert made[before:] == [weights[1].data_ptr()]
    run("5 rows", weights[0], 5)
    before = len(made)
    assert run("5 rows", weights[1], 5)[1][0].said[0] == weights[1].data_ptr()
    assert len(made) == before, "another key, the same descriptor"
    assert kernel.ordinary == 2


def test_what_is_not_understood_stays_with_triton() -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    kernels = [Kernel(["x", "y", "again", "scale", "BLOCK"], [], False) for _ in range(5)]
    kernels[0].compiled.metadata.global_scratch_size = 64  # memory of its own in every launch
    kernels[1].compiled.run.launch = lambda *args: None  # another launcher, without the function it calls
    kernels[2].compiled.metadata = SimpleNamespace()
    kernels[3].pre_run_hooks.append(lambda *args: None)
    kernels[4].compiled.run.__class__ = type("Another", (), {"launch": None, "__call__": lambda self: None})
    for kernel in kernels:
        call = Launches()
        for _ in range(3):
            call("key", (x, y), lambda kernel=kernel: plain(kernel, x, y))
        assert (kernel.ordinary, kernel.handed) == (3, [])


def test_unaligned_and_foreign_tensors_and_profilers_stay_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, call = Kernel(["x", "y", "again", "scale", "BLOCK"], [], True), Launches()
    x, y = torch.zeros(8), torch.zeros(9)

    def run(*tensors: Tensor) -> tuple[int, int]:
        call("key", tensors, lambda: plain(kernel, *tensors))
        return kernel.ordinary, len(kernel.handed)

    assert run(x, x) == (1, 0), "which of two equal addresses is meant cannot be told"
    assert run(x, y) == (2, 0)
    assert run(x, y) == (2, 1)
    assert run(x, y[1:]) == (3, 1)
    elsewhere: Any = SimpleNamespace(data_ptr=lambda: 1 << 20, get_device=lambda: 3)
    assert run(x, elsewhere) == (4, 1)
    with monkeypatch.context() as watched:
        watched.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
        assert run(x, y) == (5, 1)
    assert run(x, y) == (5, 2)


def test_one_key_for_two_kinds_of_launches_is_noticed() -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: None

    call, kernel, x = Launches(), Interpreted(), torch.zeros(8)
    for _ in range(2):
        call("key", (x,), lambda: Call(kernel, (1,), (x, 3), {}))
    with pytest.raises(AssertionError, match="key stands for"):
        call("key", (x,), lambda: Call(kernel, (1,), (x, 4), {}))


@pytest.mark.parametrize("describe", [TensorDescriptor.from_tensor, in_gluon])
def test_a_descriptor_of_other_boxes_or_rows_is_another_kind_of_launch(describe: Callable[..., Any]) -> None:
    class Interpreted:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **constants: None

    call, kernel = Launches(), Interpreted()

    def run(rows: int, box: list[int]) -> None:
        x = torch.zeros(rows, 8)
        call("key", (x,), lambda: Call(kernel, (1,), (describe(x, box), None), {}))

    run(16, [4, 8])
    run(16, [4, 8])
    for rows, box in ((16, [8, 8]), (24, [4, 8])):
        with pytest.raises(AssertionError, match="key stands for"):
            run(rows, box)


def test_a_call_that_cannot_be_described_is_not_launched() -> None:
    kernel, call, x = Kernel(["x", "y", "again", "scale", "BLOCK"], [], True), Launches(), torch.zeros(9)
    y = torch.zeros(8)

    def run(rows: Tensor) -> bool:
        return call("key", (rows, y), lambda: None if rows.data_ptr() % 16 else plain(kernel, rows, y))

    assert not run(x[1:])
    assert run(x)
    assert run(x)
    assert not run(x[1:])
    assert (kernel.ordinary, len(kernel.handed)) == (1, 1)


def test_the_installed_triton_is_handed_what_its_own_launch_hands_over(tmp_path: Path) -> None:
    kernels = handed_over(Path(__file__).with_name("launches_release.py"), tmp_path)
    assert [kernel["name"] for kernel in kernels] == ["described", "pointers"]
    for kernel in kernels:
        first, second = kernel["first"], kernel["second"]
        assert (first["triton"], second["triton"]) == (1, 0), kernel["name"]
        assert len(first["handed"]) == 1
        assert second["handed"] == first["handed"]


@pytest.mark.gpu
def test_repeated_launches_give_the_bits_of_first_ones() -> None:
    """Real kernels, through descriptors and pointers, over all rows and with other tensors of the same form."""

    def results(seed: int, rows: int) -> list[Tensor]:
        x = randn(rows, 256, seed=seed, dtype=torch.bfloat16)
        weight = randn(512, 256, seed=seed + 1, dtype=torch.bfloat16)
        bias = randn(512, seed=seed + 2, dtype=torch.bfloat16)
        total = rms_norm.add_forward(x, x.flip(0).contiguous(), weight[0].contiguous(), 1e-6)
        heads = linear.forward(x, weight, bias, torch.bfloat16).unflatten(1, (-1, 64))
        pages = [torch.zeros(16, 64, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
        positions, table = torch.arange(rows, device=DEVICE), randn(rows, 64, seed=seed + 3)
        q, k, v = heads.split((4, 2, 2), dim=1)
        q = rope_to_cache.forward(q, k, v, None, None, 0.0, positions, table, *pages, positions)
        odd = linear.forward(x[:, 1:], weight[:, 1:], None, torch.float32)
        return [*total, heads, q, *pages, odd, swiglu.forward(heads.flatten(1))]

    for rows in (1, 7, 64, 300):
        launches.forget()
        repeated = [results(seed, rows) for seed in (0, 10, 20)]
        for seed, given in zip((0, 10, 20), repeated, strict=True):
            launches.forget()
            for one, other in zip(given, results(seed, rows), strict=True):
                assert same_bits(one, other)


@pytest.mark.gpu
def test_launches_are_in_fact_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """This release of Triton is understood: the second launch of a kind is not Triton's."""
    x, weight = (randn(64, 256, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    calls = (lambda: linear.forward(x, weight, None, x.dtype), lambda: swiglu.forward(x))
    expected = [call() for call in calls]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an ordinary launch")

    monkeypatch.setattr(JITFunction, "run", refuse)
    for call, first in zip(calls, expected, strict=True):
        assert same_bits(call(), first)
