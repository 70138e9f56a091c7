"""Closeness to transformers: the argmax rule, the three comparisons, and a wrong model that they expose."""

import dataclasses
import json
import weakref

import pytest
import torch
from audit_support import SHAPE

from vexact import cli
from vexact.audit.verify import VerifyOptions, run, verify
from vexact.audit.verify.argmax import argmax_agreement
from vexact.audit.verify.gradients import Gradients
from vexact.audit.verify.logits import Closeness
from vexact.audit.verify.native import Native, NativeComparisons
from vexact.audit.verify.native_table import agreement_line, native_lines, percent
from vexact.models import ModelConfig, random_model, save_hf

LLAMA = SHAPE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
THETA, WRONG_THETA = 10_000.0, 100.0
PAIRS = ("training side, HF bfloat16", "training side, HF float32", "HF bfloat16, HF float32")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same weights twice, under another rope theta the second time."""
    root = tmp_path_factory.mktemp("closeness")
    for name, theta in (("right", THETA), ("wrong", WRONG_THETA)):
        config = ModelConfig.from_hf_dict(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}})
        save_hf(random_model(config, seed=3).named_parameters(), config, root / name)
    return root


@pytest.fixture
def wrong_decoder(monkeypatch, checkpoints):
    """Rollout and trainer agree on a wrong rope theta; only transformers reads the right one."""
    for name in ("load_model", "load_side"):
        monkeypatch.setattr(run, name, _redirected(getattr(run, name), checkpoints))


def _redirected(load, root):
    def load_wrong(*args, **kwargs):
        swapped = [root / "wrong" if argument == root / "right" else argument for argument in args]
        return load(*swapped, **kwargs)

    return load_wrong


def _masks(reference, dtype):
    """Of (R, 2) logits where ours prefers column 0."""
    ours = torch.tensor([[1.0, 0.0]]).expand(len(reference), 2)
    return argmax_agreement(ours, reference.float(), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adjacent_means_neighbouring_values_of_the_dtype_and_nothing_else(dtype):
    """All finite values in order, so also across powers of two, among subnormals and around zero."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = every[every.isfinite()].float().unique()
    assert len(values) > 60_000
    same, next_up, second_up = (torch.stack([values[: len(values) - n], values[n:]], 1) for n in (0, 1, 2))
    neighbours, further = _masks(next_up, dtype), _masks(second_up, dtype)
    assert neighbours.adjacent.all()
    assert not (neighbours.equal | neighbours.tied).any()
    assert not (further.adjacent | further.equal | further.tied).any()
    assert _masks(same, dtype).equal.all(), "argmax takes the first of two ties, as ours does"


def test_an_exact_tie_is_no_neighbour_and_only_the_reference_decides():
    reference = torch.tensor([[3.0, 20.0, 20.0], [3.0, 20.0, 20.125], [3.0, 20.0, 20.25]])
    ours = torch.tensor([[0.0, 0.1, 9.0], [0.0, 9.0, 0.1], [0.0, 9.0, 8.999]])
    agreement = argmax_agreement(ours, reference, torch.bfloat16)
    assert agreement.tied.tolist() == [True, False, False]
    assert agreement.adjacent.tolist() == [False, True, False], "however close the two are in ours"
    assert not agreement.equal.any()


def test_a_float32_reference_is_judged_by_the_unit_of_our_dtype():
    reference = torch.tensor([[16.001, 16.125], [16.001, 16.127], [15.99, 16.06], [-16.1, -16.01]])
    assert _masks(reference, torch.bfloat16).adjacent.tolist() == [True, False, False, True]
    assert not any(_masks(reference, torch.float32).adjacent.tolist())
    one_up = torch.nextafter(reference[:, :1], torch.tensor(torch.inf))
    assert _masks(torch.cat([reference[:, :1], one_up], 1), torch.float32).adjacent.all()


def test_what_is_not_a_number_agrees_with_nothing():
    reference = torch.tensor([[0.0, torch.nan], [torch.inf, torch.inf], [-torch.inf, 0.0]])
    agreement = _masks(reference, torch.bfloat16)
    assert [mask.tolist() for mask in agreement] == [[False, True, False], [False] * 3, [False] * 3]


def _native(argmax=(1000, 0, 0), cosine=1.0):
    equal, tied, adjacent = argmax
    return Native(
        Closeness(positions=1000, argmax_equal=equal, argmax_tied=tied, argmax_adjacent=adjacent),
        Gradients(2, [], [], cosine, "lm_head.weight", cosine, 1.0),
    )


@pytest.mark.parametrize(
    ("native", "line"),
    [
        (NativeComparisons(_native((990, 3, 2), 0.999), None, None), "yes"),
        (NativeComparisons(_native((990, 3, 1)), None, None), "no: argmax 99.40 %"),
        (NativeComparisons(_native(cosine=0.9989999), None, None), "no: gradient cosine 0.998999"),
        (NativeComparisons(_native(cosine=float("nan")), None, None), "no: gradient cosine nan"),
        (NativeComparisons(_native(cosine=0.5), _native((0, 0, 0), 0.9995), _native((0, 0, 0), 0.1)), "yes"),
        (
            NativeComparisons(_native((0, 0, 0)), _native(cosine=0.5), _native()),
            "no: argmax 0.00 %, gradient cosine 0.500000",
        ),
    ],
)
def test_agreement_is_argmax_in_the_same_dtype_and_the_gradient_against_float32(native, line):
    answer, _, missed = line.partition(": ")
    rule = "(argmax >= 99.5 %, gradient cosine >= 0.999)"
    assert agreement_line(native) == f"agrees with transformers: {answer} {rule}" + (f": {missed}" if missed else "")
    assert native.agrees == (answer == "yes")


def test_percentages_and_cosines_are_rounded_down():
    assert [percent(29, 30), percent(99999, 100000), percent(7, 7)] == ["96.66 %", "99.99 %", "100.00 %"]
    assert any("0.999999 lm_head.weight" in line for line in native_lines(_comparisons(0.9999999), "float32"))


def _comparisons(cosine):
    return NativeComparisons(_native(cosine=cosine), None, None)


def test_in_bfloat16_each_of_three_models_is_compared_with_each(checkpoints):
    report = verify(VerifyOptions(checkpoints / "right", dtype="bfloat16", num_prompts=6, max_new_tokens=5))
    assert report.passed
    lines = report.table().splitlines()
    starts = [line.strip().split("  ")[0] for line in lines]
    assert [start for start in starts if start in PAIRS] == [*PAIRS, *PAIRS], "a row each for logits and gradients"
    found = report.to_dict()
    for name in ("native", "native_float32", "yardstick"):
        closeness = found[name]["closeness"]
        counts = [closeness[f"argmax_{count}"] for count in ("equal", "tied", "adjacent")]
        assert closeness["positions"] == 30
        assert closeness["argmax_agreement"] == sum(counts) / 30 > 0.9
        assert 0 < closeness["mean_abs_diff"] < 0.1
        assert 0.99 < found[name]["gradients"]["cosine"] < 1
    assert found["agrees_with_transformers"] == {
        "agrees": report.native.agrees,
        "argmax": found["native"]["closeness"]["argmax_agreement"],
        "argmax_at_least": 0.995,
        "gradient_cosine": found["native_float32"]["gradients"]["cosine"],
        "gradient_cosine_at_least": 0.999,
    }


def test_in_float32_there_is_one_comparison_and_it_agrees(checkpoints, capsys):
    arguments = ["--num_prompts", "6", "--max_new_tokens", "5", "--device", "cpu"]
    assert cli.main(["verify", "--model_path", str(checkpoints / "right"), *arguments]) == 0
    table = capsys.readouterr().out
    assert table.count("training side, HF float32") == 2
    assert "bfloat16" not in table
    assert "agrees with transformers: yes (argmax >= 99.5 %, gradient cosine >= 0.999)\n" in table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("wrong_decoder")
def test_a_wrong_rope_theta_is_exact_but_does_not_agree(checkpoints, tmp_path, capsys, dtype):
    out = tmp_path / "verify.json"
    arguments = ["--num_prompts", "6", "--max_new_tokens", "5", "--device", "cpu", "--dtype", dtype, "--out", str(out)]
    assert cli.main(["verify", "--model_path", str(checkpoints / "right"), *arguments]) == 0, "closeness is information"
    table = capsys.readouterr().out
    assert "agrees with transformers: no (argmax >= 99.5 %, gradient cosine >= 0.999): argmax " in table
    assert table.endswith("EXACT: all 30 tokens have the same bits on both sides\n")
    report = json.loads(out.read_text())
    assert report["passed"]
    assert report["agrees_with_transformers"]["agrees"] is False
    assert report["agrees_with_transformers"]["argmax"] < 0.95
    assert report["agrees_with_transformers"]["gradient_cosine"] < 0.99
    if dtype == "bfloat16":
        assert report["yardstick"]["gradients"]["cosine"] > 0.995, "transformers is the right one"


def test_no_more_than_two_models_are_in_memory(checkpoints, monkeypatch):
    """Counted at the moment a further one is loaded."""
    models, alive_before = [], []

    def counted(load):
        def wrapper(*args, **kwargs):
            alive_before.append(sum(reference() is not None for reference in models))
            loaded = load(*args, **kwargs)
            models.append(weakref.ref(getattr(loaded, "model", loaded) if load is load_side else loaded))
            return loaded

        return wrapper

    load_side = run.load_side
    for name in ("load_model", "load_side", "load_reference"):
        monkeypatch.setattr(run, name, counted(getattr(run, name)))
    options = VerifyOptions(checkpoints / "right", dtype="bfloat16", num_prompts=2, max_new_tokens=2)
    verify(options)
    assert alive_before == [0, 1, 1, 1, 1], "side, rollout, transformers, its float32, transformers again"
    alive_before.clear()
    verify(dataclasses.replace(options, dtype="float32"))
    assert alive_before == [0, 1, 1]
