"""Text stays text on the command line; numbers, truth values, lists and null stay what they are."""

from __future__ import annotations

import types
import typing
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import pytest

from vexact.config import ConfigError, load_config
from vexact.config.fields import leaves
from vexact.config.schema import Keys
from vexact.config.values import takes_text

MODEL = "actor_rollout_ref.model"
ROLLOUT = "actor_rollout_ref.rollout"


def value(key: str, text: str, *more: str) -> Any:
    return reduce(getattr, key.split("."), load_config([f"{key}={text}", *more], checked=False))


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides, checked=False)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        *("2024_10_05", "2024-10-05", "1e-3", "1_000", ".50", "007", "0x1F", "1:30", "nan", "inf", "+1"),
        *("true", "False", "on", "no", "null", "None", "~", "???"),
        *("a,b", "a=b", "[x]", "[x", "{a: 1}", "(x)", "it's", "50%", "#1", "a #b", "a: b", "*", "!x", "@file", "$HOME"),
        *("größe→2", "two  words", "back\\slash", "choice(1,2)", "${", "${{ x }}", "$" + "{a b}"),
    ],
)
def test_a_name_is_what_was_typed(text: str) -> None:
    assert value("trainer.experiment_name", text) == text


@pytest.mark.parametrize("leaf", [leaf for leaf in leaves(Keys) if leaf.hint is str], ids=lambda leaf: leaf.key)
def test_every_text_key_takes_text_that_looks_like_something_else(leaf: Any) -> None:
    for text in ("1_000", "1e5", "true", "null", "[a,b]", "{% if x %}1{% endif %}"):
        assert value(leaf.key, text) == text


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['content'] }}{% endfor %}",
        '{%- set x = {"a": [1, 2]} -%}{{ x["a"][0] }}',
        "{{ messages[0]['content'] }}\n",
        "[INST] {{ messages[-1].content }} [/INST]",
        "{# a comment, unbalanced ( [ { #}{{ '${' }}",
    ],
)
def test_a_template_needs_no_quotes(template: str) -> None:
    assert value(f"{MODEL}.custom_chat_template", template) == template


@pytest.mark.parametrize("path", ["/data/a,b/c=d", "/data/[old]/x y", "C'est/là", "./-", "~b", "/m/{run}", "[x]/y"])
def test_a_path_needs_no_quotes(path: str) -> None:
    assert value(f"{MODEL}.path", path) == path
    assert value("data.train_files", path) == (path,)


def test_one_pair_of_quotes_is_taken_off() -> None:
    assert value("trainer.experiment_name", "'a b'") == "a b"
    assert value("trainer.experiment_name", '"null"') == "null"
    assert value(f"{MODEL}.custom_chat_template", "'null'") == "null"
    assert value(f"{MODEL}.custom_chat_template", r"'it\'s'") == "it's"
    assert value(f"{MODEL}.custom_chat_template", "'a' ~ 'b'") == "'a' ~ 'b'"


@pytest.mark.parametrize("text", ["null", "NULL", "", " "])
@pytest.mark.parametrize("key", [f"{MODEL}.tokenizer_path", "trainer.default_local_dir", "trainer.keep_last"])
def test_null_and_nothing_are_null_where_a_key_may_be(key: str, text: str) -> None:
    assert value(key, text) is None


def test_none_is_asked_about_where_null_is_meant() -> None:
    assert "nothing is written null here" in message(f"{MODEL}.tokenizer_path=None")
    assert "an empty list is written" in message(f"{ROLLOUT}.stop=null")
    assert value(f"{ROLLOUT}.stop", "") == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a,b]", ("a", "b")),
        ("[ a b ,c, ]", ("a b", "c")),
        ("[2024_10_05,1e-3,true]", ("2024_10_05", "1e-3", "true")),
        ("['a,b',\"c]\"]", ("a,b", "c]")),
        ("[part(1,2).parquet,x[3].parquet]", ("part(1,2).parquet", "x[3].parquet")),
        ("[]", ()),
        ("['']", ("",)),
        ("1_000", ("1_000",)),
        ("a,b", ("a,b",)),
        ("[it's,${{x}}]", ("it's", "${{x}}")),
    ],
)
def test_a_list_of_texts(text: str, expected: tuple[str, ...]) -> None:
    assert value("data.train_files", text) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train_files=[a,,b]", "item 2 is empty"),
        ("data.train_files=[,a]", "item 1 is empty"),
        ("data.train_files=[a,b", "unbalanced"),
        ("data.train_files=['a,b]", "unbalanced"),
        (f"{ROLLOUT}.stop_token_ids=['1']", "expected list of whole number, e.g. '"),
        ("trainer={experiment_name: 1_000}", "trainer.experiment_name=1000: expected text"),
        ("trainer.experiment_name=\udcff", "its bytes are not UTF-8"),
        ("trainer.save_freq=–1", "it holds '–' (U+2013) for '-'"),
        ("trainer.seed=−1", "it holds '−' (U+2212) for '-'"),
        ("—dry_run", "it holds '—' (U+2014) for '-'"),
        ("trainer.seed", "write key=value"),
        ("trainer.seed 5", "write key=value"),
        ("=5", "write key=value"),
        ("trainer.=5", "unknown key trainer."),
        ("trainer..seed=5", "unknown key trainer..seed; did you mean"),
        ("trainer.seed.more=5", "trainer.seed={'more': 5}: expected whole number"),
        ("trainer.seed=${nowhere}", "nowhere"),
    ],
)
def test_what_is_wrong_is_named(override: str, expected: str) -> None:
    assert expected in message(override)


def test_numbers_truth_values_and_lists_keep_their_types() -> None:
    assert value("trainer.seed", "1_000") == 1000
    assert value("data.max_prompt_length", "1e3") == 1000
    assert value("actor_rollout_ref.actor.optim.lr", ".5") == 0.5
    assert value("data.shuffle", "False") is False
    assert value(f"{ROLLOUT}.stop_token_ids", "[1,2,]") == (1, 2)
    assert value(f"{ROLLOUT}.cudagraph_capture_sizes", "null") is None
    assert value("data.apply_chat_template_kwargs", "{a.b: 1, c: true}") == {"a.b": 1, "c": True}
    assert value("trainer.logger", "[file,console]") == ("jsonl", "console")


def ways(hint: Any) -> list[tuple[str, Any]]:
    """Of a key's type, texts and what they stand for: every choice, both truth values, a number, null, a list."""
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    plain = {bool: [("true", True), ("False", False)], int: [("8", 8)], float: [("0.5", 0.5)], str: [("a", "a")]}
    found = []
    for part in parts:
        if typing.get_origin(part) is Literal:
            found += [(choice, choice) for choice in typing.get_args(part)]
        elif typing.get_origin(part) is tuple:
            found += [(f"[{text}]", (it,)) for text, it in ways(typing.get_args(part)[0])]
        elif part is type(None):
            found.append(("null", None))
        elif part in plain:
            found += plain[part]
    return found


def test_all_that_a_key_may_be_can_be_given(tmp_path: Path) -> None:
    recipe = tmp_path / "all.yaml"
    for leaf in leaves(Keys):
        for text, expected in ways(leaf.hint):
            bounds = leaf.metadata["range"]
            if text in ("8", "0.5", "[8]", "[0.5]") and any(bound is not None for bound in bounds.values()):
                continue  # test_config_ranges
            recipe.write_text(f"{leaf.key}: {text}\n")
            assert value(leaf.key, text) == expected, leaf.key
            found = reduce(getattr, leaf.key.split("."), load_config([f"recipe={recipe}"], checked=False))
            assert (found, type(found)) == (expected, type(expected)), leaf.key


def test_a_truth_value_beside_a_choice_is_none_of_its_texts() -> None:
    key = f"{ROLLOUT}.async_scheduling"
    for text in ("1", "0", "null", "none", "yes", "[true]", "'true'", ""):
        assert message(f"{key}={text}").startswith(f"{key}="), text
        assert "expected true or false or auto, e.g. " in message(f"{key}={text}")


def test_references_to_other_keys_are_followed_in_text() -> None:
    assert value("trainer.experiment_name", "run_${trainer.seed}", "trainer.seed=7") == "run_7"


@pytest.mark.parametrize(
    "override",
    [
        *("trainer.experiment_name=???", "trainer.experiment_name=", "data.train_files=[a,'???',$x]", "trainer.seed=5"),
        *("data.apply_chat_template_kwargs={a: {b: [1, null, .5, x]}, 3: {}}", "trainer.keep_last=null", "trainer={}"),
        *("reward.timeout_s=1e1", "data.shuffle=false", "data.apply_chat_template_kwargs={a.b: '1:30', c: x}"),
    ],
)
def test_a_reference_changes_no_other_value(override: str) -> None:
    name = "trainer.project_name"
    plain, referring = (load_config([override, f"{name}={text}"], checked=False) for text in ("x", "${oc.env:NAME,x}"))
    assert repr(plain) == repr(referring)


def test_what_one_loaded_does_not_reach_the_next() -> None:
    override = "data.apply_chat_template_kwargs={a: {b: 1}}"
    load_config([override], checked=False).data.apply_chat_template_kwargs["a"]["b"] = 2
    assert load_config([override], checked=False).data.apply_chat_template_kwargs == {"a": {"b": 1}}
    load_config([], checked=False).data.apply_chat_template_kwargs["a"] = 2
    assert load_config([], checked=False).data.apply_chat_template_kwargs == {}


def test_a_key_under_its_verl_name_is_the_same_key() -> None:
    ours, theirs = "trainer.keep_last", "trainer.max_actor_ckpt_to_keep"
    assert load_config([f"{theirs}=3", f"{ours}=5"], checked=False).trainer.keep_last == 5
    assert load_config([f"{ours}=5", f"{theirs}=3"], checked=False).trainer.keep_last == 3
    assert value("reward.custom_reward_function.name", "1e5") == "1e5"
    moved = load_config(["custom_reward_function.name=1e5"], checked=False)
    assert moved.reward.custom_reward_function.name == "1e5"
    assert moved.notices == ("custom_reward_function.name is called reward.custom_reward_function.name here",)


def test_which_keys_take_text() -> None:
    text = {leaf.key for leaf in leaves(Keys) if takes_text(leaf.hint)}
    assert {"trainer.experiment_name", "data.train_files", f"{MODEL}.custom_chat_template", "trainer.logger"} <= text
    assert text.isdisjoint({"trainer.seed", "data.shuffle", f"{ROLLOUT}.stop_token_ids", "reward.timeout_s"})
    assert f"{ROLLOUT}.async_scheduling" not in text
