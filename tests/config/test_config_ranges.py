"""Every numeric key: what lies outside its range is refused by name, what lies at its ends is taken."""

from __future__ import annotations

import math
import typing
from functools import reduce
from typing import Any

import pytest

from vexact.config import Config, ConfigError, load_config
from vexact.config.fields import LARGEST, LARGEST_FLOAT, Leaf, describe_range, leaves
from vexact.config.schema import Keys
from vexact.config.sections import rollout


def item_types(hint: Any) -> set[type]:
    """The plain types of a key, or of its items."""
    return {hint} if isinstance(hint, type) else set().union(*map(item_types, typing.get_args(hint) or (object,)))


NUMERIC = [leaf for leaf in leaves(Keys) if item_types(leaf.hint) & {int, float}]
numeric = pytest.mark.parametrize("leaf", NUMERIC, ids=lambda leaf: leaf.key)


def override(leaf: Leaf, number: float) -> str:
    is_list = any(typing.get_origin(part) is tuple for part in (leaf.hint, *typing.get_args(leaf.hint)))
    return f"{leaf.key}=[{number}]" if is_list else f"{leaf.key}={number}"


def load(leaf: Leaf, number: float) -> Config:
    return load_config([override(leaf, number)], checked=False)


def ends(leaf: Leaf) -> tuple[float | None, float]:
    """The least and the largest value of a key; None where there is no least."""
    bounds, is_whole = leaf.metadata["range"], int in item_types(leaf.hint)
    low, high = bounds["ge"], bounds["le"]
    if low is None and bounds["gt"] is not None:
        low = math.nextafter(bounds["gt"], math.inf)
    if high is None and bounds["lt"] is not None:
        high = math.nextafter(bounds["lt"], -math.inf)
    return low, high if high is not None else LARGEST if is_whole else LARGEST_FLOAT


@numeric
def test_what_no_number_may_be(leaf: Leaf) -> None:
    above = [] if leaf.metadata["infinite"] else ["inf", "1e300", 10**40]
    for number in ["nan", "-inf", "-1e300", *above]:
        with pytest.raises(ConfigError, match=rf"^{leaf.key}=.*(must be|expected (list of )?whole number)"):
            load(leaf, number)


@numeric
def test_the_ends_of_a_range_pass_and_what_is_past_them_does_not(leaf: Leaf) -> None:
    least, largest = ends(leaf)
    is_whole = int in item_types(leaf.hint)
    for number in (least, largest):
        if number is not None:
            found = reduce(getattr, leaf.key.split("."), load(leaf, int(number) if is_whole else number))
            assert found in (number, (number,))
    step = 1 if is_whole else 1e-6
    outside = [] if leaf.metadata["infinite"] else [int(largest) + 1 if is_whole else largest * 1.01 + step]
    outside += [] if least is None else [int(least) - 1 if is_whole else least - step]
    for number in outside:
        with pytest.raises(ConfigError, match=f"^{leaf.key}="):
            load(leaf, number)


def test_a_list_is_told_as_it_is_written() -> None:
    with pytest.raises(ConfigError, match=r"^trainer.profile_steps=\[3, 0\]: must be >= 1 "):
        load_config(["trainer.profile_steps=[3,0]"], checked=False)


def test_every_number_has_a_least_value() -> None:
    assert [leaf.key for leaf in NUMERIC if ends(leaf)[0] is None] == []


def test_the_clip_of_gradients_may_be_infinite() -> None:
    assert load_config(["actor_rollout_ref.actor.grad_clip=inf"], checked=False).actor.grad_clip == math.inf


def test_the_coldest_temperature_is_the_samplers() -> None:
    from vexact.rollout.sampling import sampling_params

    for name in ("MIN_TEMPERATURE", "MAX_TEMPERATURE", "MAX_SAMPLES"):
        assert getattr(rollout, name) == getattr(sampling_params, name)


def test_ranges_are_described_as_they_are_checked() -> None:
    assert describe_range({"ge": 0, "gt": None, "lt": 1, "le": None}) == ">= 0 and < 1"
    assert describe_range({"ge": 0, "gt": None, "lt": None, "le": 2**63 - 1}) == ">= 0 and <= 2^63 - 1"
