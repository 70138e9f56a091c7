"""Ground truths: text that an answer can match, or a message that names row and column."""

import datetime
import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vexact.data import ColumnNames, load_rows
from vexact.data.ground_truth import text_truth
from vexact.reward.graders import compute_score

NAN = float("nan")


def write(path, truths, source=None):
    records = [{"prompt": "1+2=", "data_source": source, "reward_model": {"ground_truth": t}} for t in truths]
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("3", "3"),
        (" 3\n", " 3\n"),
        (3, "3"),
        (3.0, "3"),
        (-0.0, "0"),
        (0.5, "0.5"),
        (1e-7, "0.0000001"),
        (1e22, "1" + 22 * "0"),
        (10**30, "1" + 30 * "0"),
        (Decimal("3.00"), "3"),
        (Decimal("12.3450"), "12.345"),
        (Decimal("0.1234567890123456789012345678901234567"), "0.1234567890123456789012345678901234567"),
        (np.int64(7), "7"),
        (np.float64(7), "7"),
        (np.float32(2.5), "2.5"),
        (np.str_("x"), "x"),
    ],
)
def test_a_number_becomes_the_text_a_model_would_write(value, text):
    assert text_truth(value, "exact_match", "row 0") == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_finite_number_keeps_its_value(value):
    assert float(text_truth(value, "exact_match", "row 0")) == value


@pytest.mark.parametrize("source", ["exact_match", "openai/gsm8k", "math", "vexact/addition"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is null"),
        (NAN, "float nan"),
        (float("inf"), "float inf"),
        (np.float32("nan"), "float nan"),
        (Decimal("NaN"), "Decimal"),
        (True, "the truth value True"),
        (np.bool_(False), "the truth value False"),
        (["3"], r"list \['3'\]"),
        ({"value": "3"}, "dict"),
        (b"3", "bytes b'3'"),
        (np.array([3]), "ndarray"),
        (datetime.date(2024, 1, 3), "date"),
        ("", "'' is blank"),
        (" \n", "is blank"),
    ],
)
def test_what_no_answer_can_match_is_refused(source, value, words):
    with pytest.raises(ValueError, match=rf"f, row 3: column 'a': .*{words}.*no answer can match; give the answer as"):
        text_truth(value, source, "f, row 3: column 'a'")


@pytest.mark.parametrize(
    "text",
    [
        "18",
        "-1,234.5",
        "$5",
        "because\n#### 18",
        "18 apples",
        "#### 3 #### 18",
        "7.",
        "50%",
        "5 km/h",
        "7)",
        "18\n2024",
    ],
)
def test_gsm8k_answers_grade_themselves(text):
    truth = text_truth(text, "openai/gsm8k", "row 0")
    answer = truth if "####" in truth else f"#### {truth}"
    assert compute_score("openai/gsm8k", answer, truth)["score"] == 1.0


@pytest.mark.parametrize(
    "text",
    [
        *("eighteen", "####", "#### none", "3/4", "1e5", "2^10", "x = 3"),
        *(
            "1 234",
            "1\u202f234",
            "1_000",
            "1\u2019000",
            "12:30",
            "3 1/2",
            "10-20",
            "5 \u2013 7",
            "2 * 3",
            "work #### 1 000",
        ),
    ],
)
def test_gsm8k_answers_without_a_number_are_refused(text):
    with pytest.raises(ValueError, match=r"row 0: the ground truth '.*' holds no number that GSM8K's grader reads"):
        text_truth(text, "gsm8k", "row 0")


def test_numbers_in_files_match_the_answer(tmp_path):
    table = pa.table({"question": ["1+2=", "1/2="], "answer": pa.array([3.0, 0.5])})
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text('{"question": "1+2=", "answer": 3}\n{"question": "1/2=", "answer": 0.5}\n')
    columns = ColumnNames(prompt="question", answer="answer")
    for name in ("rows.parquet", "rows.jsonl"):
        rows = load_rows(tmp_path / name, columns)
        assert [row.ground_truth for row in rows] == ["3", "0.5"]
        assert [compute_score(row.data_source, row.ground_truth, row.ground_truth)["score"] for row in rows] == [1, 1]


def test_a_refusal_names_file_row_and_column(tmp_path):
    where = r"bad\.jsonl, row 1: column 'reward_model\.ground_truth': the ground truth is "
    for truth, words in ((None, "null"), (NAN, "float nan"), ([1, 2], "list")):
        with pytest.raises(ValueError, match=where + words):
            load_rows(write(tmp_path / "bad.jsonl", ["3", truth]))
    (tmp_path / "rows.jsonl").write_text('{"q": "1?", "a": null}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 0: column 'a': the ground truth is null"):
        load_rows(tmp_path / "rows.jsonl", ColumnNames(prompt="q", answer="a"))


def test_a_function_of_the_users_gets_what_the_file_holds(tmp_path):
    truths = [3.0, ["a", "b"], {"cases": [1]}, None, True, ""]
    rows = load_rows(write(tmp_path / "rows.jsonl", truths, "my/task"), custom_reward=True)
    assert [row.ground_truth for row in rows] == truths
    assert [type(row.ground_truth) for row in rows] == [type(truth) for truth in truths]
    with pytest.raises(ValueError, match=r"row 0: column 'reward_model\.ground_truth': .* is nan, a missing"):
        load_rows(write(tmp_path / "bad.jsonl", [NAN]), custom_reward=True)


def test_procedural_rows_need_their_entry(tmp_path):
    path = write(tmp_path / "rows.jsonl", ["3"], "reasoning_gym/chain_sum")
    with pytest.raises(ValueError, match=r"row 0: data_source='reasoning_gym/chain_sum' needs extra_info\.entry"):
        load_rows(path)
    assert load_rows(path, custom_reward=True)[0].ground_truth == "3"


@pytest.mark.parametrize(
    ("source", "words"),
    [(["a"], r"list \['a'\]"), (1.5, "float 1.5"), (True, "bool True"), ("", "str ''"), (" ", "str ' '"), ({}, "dict")],
)
def test_a_data_source_must_be_a_name(tmp_path, source, words):
    with pytest.raises(ValueError, match=rf"row 0: column 'data_source' must name the row's grader, it is {words}"):
        load_rows(write(tmp_path / "rows.jsonl", ["3"], source))


def test_a_missing_data_source_goes_by_the_answer(tmp_path):
    for missing in (None, NAN):
        rows = load_rows(write(tmp_path / "rows.jsonl", ["3", "#### 3", 3.0], missing))
        assert [row.data_source for row in rows] == ["exact_match", "openai/gsm8k", "exact_match"]
    assert load_rows(write(tmp_path / "rows.jsonl", ["3"], 12))[0].data_source == "12"
