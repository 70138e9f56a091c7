import pytest

from vexact.data import load_rows
from vexact.data.tasks import parse_task


def test_task_rows_are_seeded_and_follow_the_settings():
    source = "reasoning_gym:chain_sum?size=5&seed=1&min_terms=2&max_terms=2&max_digits=1"
    rows = load_rows(source)
    assert len(rows) == 5
    assert rows == load_rows(source)
    assert rows != load_rows(source.replace("seed=1", "seed=2"))
    for row in rows:
        expression = row.prompt.removeprefix("State the final answer to the following arithmetic problem: ")
        assert eval(expression.removesuffix("=")) == int(row.ground_truth)
        assert row.data_source == "reasoning_gym/chain_sum"


def test_system_prompt_becomes_a_message():
    row = load_rows("reasoning_gym:gcd?size=1&system_prompt=direct")[0]
    assert [message["role"] for message in row.prompt] == ["system", "user"]
    assert "<answer>" in row.prompt[0]["content"]


def test_settings_are_json_where_they_are_json():
    spec = parse_task("reasoning_gym:leg_counting?size=7&seed=3&a=1.5&b=true&c=%5B1%2C2%5D&d=text")
    assert (spec.name, spec.size, spec.seed) == ("leg_counting", 7, 3)
    assert spec.settings == {"a": 1.5, "b": True, "c": [1, 2], "d": "text"}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "reasoning_gym:chain_sums",
            r"unknown reasoning-gym task 'chain_sums'; did you mean chain_sum.*known tasks: .*gcd",
        ),
        ("reasoning_gym:chain_sum?terms=2", "'chain_sum' has no setting terms; its settings: min_terms, max_terms"),
        ("reasoning_gym:chain_sum?min_terms=9&max_terms=2", "refuses the settings.*max_terms must be >= min_terms"),
        ("reasoning_gym:chain_sum?size=0", "size=0 must be an integer of at least 1"),
        ("reasoning_gym:chain_sum?seed=x", "seed='x' must be an integer of at least 0"),
        ("reasoning_gym:chain_sum?size", "settings must read key=value"),
    ],
)
def test_bad_task_names_the_fix(source, message):
    with pytest.raises(ValueError, match=message):
        load_rows(source)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'vexact\[tasks\]'"):
        load_rows("reasoning_gym:chain_sum")


def test_a_setting_stands_once():
    with pytest.raises(ValueError, match=r"'reasoning_gym:chain_sum\?size=4&size=5': a setting is given twice"):
        parse_task("reasoning_gym:chain_sum?size=4&size=5")
