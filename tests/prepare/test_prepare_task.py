import pytest

from vexact.data import load_rows
from vexact.prepare import prepare
from vexact.reward.graders import compute_score

TASK = "reasoning_gym:chain_sum?size=30&max_digits=1&max_terms=3"


def test_task_rows_are_gradable_and_the_splits_do_not_meet(tmp_path):
    folder = prepare(TASK, tmp_path / "sums", arch=None, seed=4)
    train, test = load_rows(folder / "train.parquet"), load_rows(folder / "test.parquet")
    assert (len(train), len(test)) == (30, 100)
    for row in train[:5] + test[:5]:
        assert row.prompt[0]["role"] == "user"
        assert compute_score(row.data_source, row.ground_truth, row.ground_truth, row.extra_info)["score"] == 1.0
    assert train[3].extra_info["index"] == 3
    assert {row.extra_info["split"] for row in test} == {"test"}
    assert not {row.extra_info["entry"] for row in train} & {row.extra_info["entry"] for row in test}
    direct = load_rows(TASK + "&seed=4")
    assert [row.text for row in train] == [row.text for row in direct]


def test_short_name_and_options(tmp_path):
    folder = prepare("task", tmp_path / "gcd", task="gcd?size=5", test_size=3)
    assert len(load_rows(folder / "train.parquet")) == 5
    assert len(load_rows(folder / "test.parquet")) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "gdc"}, r"unknown reasoning-gym task 'gdc'; did you mean .*gcd"),
        ({"task": "gcd", "test_size": 0}, "test_size=0 must be at least 1"),
        ({}, "task needs task"),
        ({"task": "gcd?seed=1", "seed": 2}, "the task sets seed=1, and --seed is 2; give one of them"),
    ],
)
def test_bad_task(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare("task", tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_what_was_made_is_there_still_or_named(tmp_path):
    def again():
        return prepare("task", tmp_path / "gcd", task="gcd?size=5", test_size=3)

    assert again() == again()
    (tmp_path / "gcd" / "test.parquet").unlink()
    with pytest.raises(
        ValueError, match=r"gcd lacks test\.parquet, which was made there; remove .*gcd to make it again"
    ):
        again()
