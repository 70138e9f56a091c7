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
        ({**VERL_ROW, "prompt": [{"role": "user"}]}, r"row 1: column 'prompt', message 0 \(role 'user'\): content"),
        ({**VERL_ROW, "prompt": ["1+2="]}, r"row 1: column 'prompt' must be a string or a non-empty list"),
        ({**VERL_ROW, "prompt": {"role": "user", "content": "x"}}, "must be a string or a non-empty list .*is dict"),
        ({**VERL_ROW, "prompt": None}, "must be a string or a non-empty list .* it is NoneType"),
        ({**VERL_ROW, "prompt": 5}, "must be a string or a non-empty list .* it is int"),
        ({**VERL_ROW, "prompt": ""}, "empty string"),
        ({**VERL_ROW, "prompt": " \n"}, "row 1: column 'prompt' is blank"),
        ({**VERL_ROW, "prompt": [{"role": "user", "content": " "}]}, "row 1: .*content of every message is blank"),
        ({**VERL_ROW, "prompt": json.dumps(VERL_ROW["prompt"])}, "row 1: .*spells a list of messages.*store the list"),
        ({**VERL_ROW, "prompt": str(VERL_ROW["prompt"])}, "row 1: .*spells a list of messages"),
        ({**VERL_ROW, "prompt": "a\ud800"}, "row 1: column 'prompt' holds the lone surrogate"),
        ({**VERL_ROW, "reward_model": None}, "must be a mapping with the key 'ground_truth', it is None"),
        ({**VERL_ROW, "extra_info": "{}"}, "'extra_info' must be a mapping, it is str"),
        ({**VERL_ROW, "extra_info": [["a", 1]]}, "'extra_info' must be a mapping, it is list"),
        ({**VERL_ROW, "extra_info": 3}, "'extra_info' must be a mapping, it is int 3"),
        ([1, 2], r"bad\.jsonl, line 2: expected a JSON object, got \[1, 2\]"),
    ],
)  # fmt: skip
def test_bad_row_names_file_row_and_fix(tmp_path, record, message):
    path = write_jsonl(tmp_path / "bad.jsonl", [VERL_ROW, record])
    with pytest.raises(ValueError, match=message):
        load_rows(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"images": [{"path": "a.png"}]}, r"row 1: column 'images' holds .*a\.png.* would be left out of the prompt"),
        ({"images": [{"bytes": None, "path": "a.png"}]}, "column 'images' holds"),
        ({"images": [[[0, 0, 0]]]}, "column 'images' holds"),
        ({"videos": ["a.mp4"]}, "column 'videos' holds"),
        ({"tools": '[{"name": "search"}]'}, "column 'tools' holds"),
        ({"agent_name": "tool_agent"}, "column 'agent_name' asks for 'tool_agent', and only single_turn_agent"),
    ],
)
def test_what_a_prompt_holds_beside_its_text_is_refused(tmp_path, extra, message):
    nothing = {"images": [], "videos": None, "tools": "[]", "agent_name": "single_turn_agent"}
    assert len(load_rows(write_jsonl(tmp_path / "text.jsonl", [VERL_ROW | nothing] * 2))) == 2
    with pytest.raises(ValueError, match=message):
        load_rows(write_jsonl(tmp_path / "more.jsonl", [VERL_ROW | nothing, VERL_ROW | extra]))


@pytest.mark.parametrize(
    "nothing",
    [
        {"images": [None], "videos": [[]], "audios": {}, "tools": " "},
        {"images": {"bytes": None, "path": None}, "videos": [{"bytes": None, "path": None}], "audios": False},
        {"images": "None", "videos": "nan", "audios": float("nan"), "tools": "[ ]"},
        {"images": 0, "agent_name": "None"},
        {"agent_name": float("nan"), "extra_info": {"need_tools_kwargs": True, "tools_kwargs": {"calc": {}}}},
    ],
)
def test_columns_that_say_in_any_way_that_there_is_none_are_taken(tmp_path, nothing):
    """A table has its columns in every row, and each of its writers another way to leave one empty."""
    assert len(load_rows(write_jsonl(tmp_path / "rows.jsonl", [VERL_ROW | nothing]))) == 1


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
        ("empty.json", "[]", "empty.json holds no rows"),
        ("blank.jsonl", "\n \n", "blank.jsonl holds no rows"),
        ("empty.parquet", "", r"empty\.parquet is not a readable parquet file"),
        (
            "twice.jsonl",
            '{"prompt": "a", "prompt": "b"}',
            r"twice\.jsonl, line 1 is not valid JSON: .*'prompt' appears twice",
        ),
        ("deep.jsonl", "[" * 10**5, r"deep\.jsonl, line 1 is not valid JSON"),
        ("digits.jsonl", '{"prompt": ' + "1" * 5000 + "}", r"digits\.jsonl, line 1 is not valid JSON"),
        ("lfs.parquet", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "lfs.parquet is a Git LFS pointer"),
        ("broken.parquet", "not parquet", r"broken\.parquet is not a readable parquet file"),
        ("rows.csv", "a,b", r"unknown data file type '\.csv'; known: \.parquet, \.jsonl, \.json"),
    ],
)
def test_unreadable_file(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_rows(path)


def test_a_byte_order_mark_is_no_data(tmp_path):
    for name, text in (("rows.jsonl", json.dumps(VERL_ROW)), ("rows.json", json.dumps([VERL_ROW]))):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert load_rows(tmp_path / name)[0].ground_truth == "3"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_text_in_another_encoding_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(json.dumps(VERL_ROW).replace("What", "\u00dc").encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text: byte 0xdc at \d+; save it as UTF-8"):
        load_rows(tmp_path / name)


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([VERL_ROW] * 50), path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"rows\.parquet is not a readable parquet file"):
        load_rows(path)


def test_parquet_columns_are_those_of_the_file_alone(tmp_path):
    folder = tmp_path / "data_source=openai"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([without("data_source")]), folder / "rows.parquet")
    assert load_rows(folder / "rows.parquet")[0].data_source == "exact_match"
    table = pa.table([["1?"], ["2?"]], names=["prompt", "prompt"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice\.parquet has several columns named 'prompt'"):
        load_rows(tmp_path / "twice.parquet")


def test_parquet_rows_with_parts_and_without(tmp_path):
    """A parquet file gives every part the keys of all, null where they are missing."""
    parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "2="}]
    pq.write_table(
        pa.Table.from_pylist([{**VERL_ROW, "prompt": [{"role": "user", "content": parts}]}]), tmp_path / "parts.parquet"
    )
    assert load_rows(tmp_path / "parts.parquet")[0].prompt == ({"role": "user", "content": "1+2="},)
    image = [*parts, {"type": "image", "image": "x.png"}]
    pq.write_table(
        pa.Table.from_pylist([{**VERL_ROW, "prompt": [{"role": "user", "content": image}]}]), tmp_path / "image.parquet"
    )
    with pytest.raises(ValueError, match=r"image\.parquet, row 0: .*part 2 is of type 'image'"):
        load_rows(tmp_path / "image.parquet")


def test_a_question_about_json_is_a_question(tmp_path):
    questions = [
        '[{"role": "user"}] is what?',
        '[{"a": 1}]',
        "[1, 2] has the role of content?",
        '[{"role": 1, "content"',
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [{**VERL_ROW, "prompt": question} for question in questions])
    assert [row.prompt for row in load_rows(path)] == questions


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
