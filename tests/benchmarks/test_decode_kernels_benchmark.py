"""The benchmark of a decode step's kernels: its figures by hand, the kernels it expects, a small run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "ops" / "kernels"))
from rowwise import DEVICE, same_bits  # first: it decides how kernels run

# isort: split
from benchmarks.decode import kernels as decode_kernels
from benchmarks.decode import step as decode_step
from benchmarks.decode import tiles as decode_tiles
from benchmarks.decode.step import Kernel
from vexact.ops import dispatch
from vexact.ops.kernels import chain, launches, linear_swiglu
from vexact.ops.kernels.chain import Chain
from vexact.ops.kernels.linear import select
from vexact.ops.kernels.linear.tiles import Tile

TINY = decode_kernels.TINY | {
    **{"vocab_size": 48, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 16},
}


@pytest.fixture(autouse=True)
def chain_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "STEPS", chain.STEPS)


def test_times_by_hand() -> None:
    """Two replays of two kernels, of which the second starts 3 µs before the first ends."""
    kernels = [Kernel("norm", "_norm", 30), Kernel("down", "matmul_", 90)]

    def replay(start: float) -> list[dict[str, Any]]:
        spans = (("_norm_kernel", start, 10), ("matmul_tma_kernel", start + 7, 8))
        found = [{"cat": "kernel", "name": name, "ts": at, "dur": lasts} for name, at, lasts in spans]
        return [{"cat": "cpu_op", "name": "x", "ts": start, "dur": 99}, *found[::-1]]

    events = [*replay(100), *replay(0)]
    assert decode_step.read_trace(events, kernels, 2) == {
        "norm": {"us": 10.0, "ran_us": 10.0, "bytes": 30.0, "launches": 1.0},
        "down": {"us": 5.0, "ran_us": 8.0, "bytes": 90.0, "launches": 1.0},
    }
    with pytest.raises(ValueError, match="holds 4 kernels, expected 1 times 2"):
        decode_step.read_trace(events, kernels, 1)
    with pytest.raises(ValueError, match="kernel 0 of a step is _norm_kernel, expected matmul_ \\(down\\)"):
        decode_step.read_trace(events, kernels[::-1], 2)


def test_the_table_that_is_printed() -> None:
    results = [
        {"rows": 8, "chain": {"overlap": True, "early": False, "fuse": True}},
        {"rows": 64, "chain": {}},
    ]
    space: dict[str, Any] = {"Chain": Chain, "LARGE": chain.LARGE}
    exec(decode_kernels.table(results).replace(": tuple[tuple[int, Chain], ...]", ""), space)
    assert space["STEPS"] == ((8, Chain(overlap=True, fuse=True)), (64, Chain()), (chain.LARGE, Chain()))


def launched(step: decode_step.Step, monkeypatch: pytest.MonkeyPatch) -> tuple[list[launches.Call], torch.Tensor]:
    """What a step launches, and its logits."""
    calls: list[launches.Call] = []
    bind = launches.Launches._bind

    def note(self: Any, key: Any, tensors: Any, call: launches.Call) -> None:
        calls.append(call)
        if DEVICE == "cpu":  # the interpreter runs one kernel after another
            alone = dict.fromkeys(call.constants.keys() & {"CHAINED", "OVERLAP"}, 0)
            call = call._replace(constants=call.constants | alone)
        bind(self, key, tensors, call)

    with monkeypatch.context() as patch:
        patch.setattr(launches.Launches, "_bind", note)
        patch.setattr(launches, "_record", lambda *args: None)  # every launch comes by, also one of a known kind
        if DEVICE == "cpu":

            def kernels(op: str, tensor: torch.Tensor) -> ModuleType:
                return dispatch._load("kernels", op)

            patch.setattr(dispatch, "module", kernels)
            for name, module in list(sys.modules.items()):
                if name.startswith("vexact.ops.kernels") and hasattr(module, "overlaps"):
                    patch.setattr(module, "overlaps", lambda device: True)
        launches.forget()
        logits = step.run().clone()
    launches.forget()
    return calls, logits


@pytest.mark.parametrize("rows", [1, 5])
def test_every_kernel_of_a_step_but_the_first_is_chained(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decode_step.random_decoder(TINY, 2, torch.device(DEVICE)).to(torch.bfloat16)
    model.init_rope(DEVICE)
    step = decode_step.decode_step(model, rows, 70)
    monkeypatch.setattr(chain, "STEPS", ((chain.LARGE, Chain()),))
    plain, expected = launched(step, monkeypatch)
    for fuse in (False, True):
        monkeypatch.setattr(chain, "STEPS", ((chain.LARGE, Chain(overlap=True, early=True, fuse=fuse)),))
        calls, logits = launched(step, monkeypatch)
        assert same_bits(logits, expected)
        names = [call.kernel.__name__ for call in calls]
        kernels = decode_step.kernels(step, fused=fuse)
        assert len(names) == len(kernels) == len(plain) - 2 * fuse
        for name, kernel in zip(names, kernels, strict=True):
            assert name.startswith(kernel.function), kernel.kind
        chained = [call.constants.get("CHAINED") for call in calls]
        assert chained[0] is None, "the embedding follows what uploads its tokens"
        kinds = {2: {"norm", "rotation", "swiglu"}, 1: {"qkv", "attention", "o", "gate_up", "down", "lm_head"}}
        assert all(kernel.kind in kinds[how] for how, kernel in zip(chained[1:], kernels[1:], strict=True))
        assert all(call.constants["launch_pdl"] for call in calls[1:])
    assert {call.constants.get("CHAINED") for call in plain} == {None, 0}


def test_bytes_are_those_of_the_roofline() -> None:
    model = decode_step.random_decoder(TINY, 2, torch.device("cpu"))
    kernels = decode_step.kernels(decode_step.decode_step(model, 3, 64), fused=False)
    by_kind = {kernel.kind: kernel.read for kernel in kernels}
    assert by_kind["down"] == 2 * (32 * 40 + 3 * 40 + 3 * 32)
    assert by_kind["lm_head"] == 2 * (48 * 32 + 3 * 32) + 4 * 3 * 48
    assert by_kind["attention"] == 2 * (3 * 64 * 2 * 2 * 16 + 2 * 3 * 4 * 16)


def test_a_tile_is_in_use_and_then_no_longer() -> None:
    tile = Tile("tma", 16, 32, 64, 4, 3)
    before = dict(select.TUNED)
    for key in ((4096, 2048), (4000, 2000)):  # in the table, and near one
        with decode_tiles.tile_in_use(key, 8, tile):
            assert select.select_tile("forward", 8, *key, torch.bfloat16, True) == tile
            assert select.select_tile("forward", 9, *key, torch.bfloat16, True) != tile
        assert before == select.TUNED
        assert select.select_tile("forward", 8, *key, torch.bfloat16, True) != tile
    with decode_tiles.tile_in_use(None, 8, tile):
        assert linear_swiglu.TILES[0] == (8, tile)
    assert linear_swiglu.TILES[0][1] != tile


def test_candidates_fit_beside_each_other_or_alone() -> None:
    for rows in (1, 24, 64, 256):
        for halved in (False, True):
            tiles = decode_tiles.candidates(rows, halved)
            sizes = [2 * t.stages * t.block_k * (t.block_m + t.block_n * (1 + halved)) for t in tiles]
            assert len(tiles) >= 8
            assert min(sizes) <= 72 * 1024 < max(sizes) <= 200 * 1024


def test_a_small_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "decode.json"
    command = ["kernels.py", "--shape", "tiny", "--rows", "2", "--keys", "70", "--layers", "1", "--batches", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--rounds", "1", "--tune", "--budget-s", "1", "--out", str(out)])
    assert decode_kernels.main() == 0
    (result,) = json.loads(out.read_text())["results"]
    assert set(result["variants"]) >= set(decode_kernels.VARIANTS)
    assert result["rows_compared"] == 4
    assert set(result["tiles"]) == {"gate_up", "down", "qkv", "o"}
    assert "STEPS" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*command, "--keys", "4096"])
    with pytest.raises(SystemExit, match="2"):
        decode_kernels.main()


def test_a_wrong_bit_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decode_step.random_decoder(TINY, 1, torch.device("cpu"))
    step = decode_step.decode_step(model, 2, 64)
    batches = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    expected = decode_kernels.expected_logits(step, batches)
    run, out = decode_kernels.captured(step, Chain())
    assert decode_kernels.rows_different(step, run, out, batches, expected) == 0

    before = out[1].clone()

    def too_early() -> None:  # the second row is still that of the batch before
        run()
        fresh = out[1].clone()
        out[1] = before
        before.copy_(fresh)

    assert decode_kernels.rows_different(step, too_early, out, batches, expected) == 2
