import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vexact.data import ColumnNames, load_rows

VERL_ROW = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "What is 1+2?"}],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "extra_info": {"index": 4, "split": "train"},
}


def write_jsonl(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_parquet_jsonl_and_json_give_the_same_rows(tmp_path):
    pq.write_table(pa.Table.from_pylist([VERL_ROW] * 3), tmp_path / "rows.parquet")
    write_jsonl(tmp_path / "rows.jsonl", [VERL_ROW] * 3)
    (tmp_path / "rows.json").write_text(json.dumps([VERL_ROW] * 3))
    write_jsonl(tmp_path / "lines.json", [VERL_ROW] * 3)
    names = ("rows.parquet", "rows.jsonl", "rows.json", "lines.json")
    parquet, *others = [load_rows(tmp_path / name) for name in names]
    assert all(rows == parquet for rows in others)
    row = parquet[0]
    assert (row.data_source, row.ground_truth, row.extra_info) == ("openai/gsm8k", "3", {"index": 4, "split": "train"})
    assert row.prompt == ({"role": "user", "content": "What is 1+2?"},)
    assert row.text == "What is 1+2?"


def test_plain_question_and_answer_columns(tmp_path):
    records = [{"question": "1+2?", "answer": "3"}, {"question": "2+2?", "answer": "because\n#### 4"}]
    path = write_jsonl(tmp_path / "plain.jsonl", records)
    rows = load_rows(path, ColumnNames(prompt="question", answer="answer"))
    assert [row.data_source for row in rows] == ["exact_match", "openai/gsm8k"]
    assert [row.ground_truth for row in rows] == ["3", "because\n#### 4"]
    assert [row.prompt for row in rows] == ["1+2?", "2+2?"]


def test_several_files_join_and_max_samples_cuts(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", [VERL_ROW] * 2)
    two = write_jsonl(tmp_path / "b.jsonl", [{**VERL_ROW, "data_source": "b"}] * 2)
    assert [row.data_source for row in load_rows([one, str(two)])] == ["openai/gsm8k"] * 2 + ["b"] * 2
    assert len(load_rows([one, two], max_samples=3)) == 3


def without(key):
    return {name: value for name, value in VERL_ROW.items() if name != key}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (without("prompt"), r"bad\.jsonl, row 1: no column 'prompt'; columns present: data_source, extra_info, "
                            r"reward_model\. Set data\.prompt_key"),
        (without("reward_model"), r"row 1: no column 'reward_model'.*Set data\.answer_key"),
        ({**VERL_ROW, "reward_model": {"style": "rule"}}, r"must be a mapping with the key 'ground_truth'"),
        ({**VERL_ROW, "prompt": []}, "non-empty list of"),
        ({**VERL_ROW, "prompt": [{"role": "user"}]}, r"row 1: column 'prompt' must be a string or a non-empty list"),
        ({**VERL_ROW, "prompt": ""}, "empty string"),
        ({**VERL_ROW, "extra_info": 3}, "'extra_info' must be a mapping, it is int 3"),
        ([1, 2], r"bad\.jsonl, line 2: expected a JSON object, got \[1, 2\]"),
    ],
)  # fmt: skip
def test_bad_row_names_file_row_and_fix(tmp_path, record, message):
    path = write_jsonl(tmp_path / "bad.jsonl", [VERL_ROW, record])
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_missing_answer_column(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "1?"}])
    with pytest.raises(ValueError, match=r"no column 'solution'; columns present: question\. Set data\.answer_key"):
        load_rows(path, ColumnNames(prompt="question", answer="solution"))


def test_file_not_found():
    with pytest.raises(ValueError, match=r"data file 'nowhere\.parquet' does not exist .*data\.train_files"):
        load_rows("nowhere.parquet")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.jsonl", "", "empty.jsonl holds no rows"),
        ("broken.jsonl", "{", r"broken\.jsonl, line 1 is not valid JSON"),
        ("broken.json", "[1,", r"broken\.json is not valid JSON"),
        ("list.json", "[1]", r"list\.json, row 0: expected a JSON object"),
        ("broken.parquet", "not parquet", r"broken\.parquet is not a readable parquet file"),
        ("rows.csv", "a,b", r"unknown data file type '\.csv'; known: \.parquet, \.jsonl, \.json"),
    ],
)
def test_unreadable_file(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_no_files():
    with pytest.raises(ValueError, match=r"set data\.train_files"):
        load_rows([])


def test_dataset_directory_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        load_rows(tmp_path)


def test_dataset_directory(tmp_path, monkeypatch):
    """The real package is optional; a stand-in shows what is asked of it."""
    import sys
    import types

    class DatasetDict(dict):
        pass

    class Dataset:
        def to_list(self):
            return [VERL_ROW]

    fake = types.SimpleNamespace(DatasetDict=DatasetDict, load_from_disk=lambda path: Dataset())
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert load_rows(tmp_path)[0].ground_truth == "3"
    fake.load_from_disk = lambda path: DatasetDict(train=Dataset(), test=Dataset())
    with pytest.raises(ValueError, match=r"several splits \(train, test\); give one of them, such as .*/train"):
        load_rows(tmp_path)
