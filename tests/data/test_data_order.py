import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vexact.data.order import DataOrder


@given(
    num_rows=st.integers(1, 40),
    seed=st.integers(0, 2**40),
    cuts=st.lists(st.integers(0, 30), max_size=6),
    shuffle=st.booleans(),
)
@settings(max_examples=60)
def test_pieces_join_to_the_whole(num_rows, seed, cuts, shuffle):
    order = DataOrder(num_rows, seed, shuffle)
    pieces, cursor = [], 0
    for count in cuts:
        pieces += DataOrder(num_rows, seed, shuffle).take(cursor, count)
        cursor += count
    assert pieces == order.take(0, cursor)


@given(num_rows=st.integers(1, 50), seed=st.integers(0, 1000), epoch=st.integers(0, 5))
@settings(max_examples=40)
def test_every_epoch_holds_every_row_once(num_rows, seed, epoch):
    rows = DataOrder(num_rows, seed).take(epoch * num_rows, num_rows)
    assert sorted(rows) == list(range(num_rows))


def test_order_depends_on_seed_and_epoch():
    order = DataOrder(100, seed=1)
    assert order.take(0, 100) != order.take(100, 100)
    assert order.take(0, 100) != DataOrder(100, seed=2).take(0, 100)
    assert order.epoch(99) == 0
    assert order.epoch(100) == 1


def test_order_is_frozen():
    """A checkpoint stores only the cursor, so the permutation must never change between releases."""
    assert DataOrder(8, seed=7).take(0, 16) == [4, 1, 6, 3, 2, 7, 5, 0, 3, 1, 6, 2, 5, 4, 0, 7]
    assert DataOrder(4, seed=7, shuffle=False).take(3, 3) == [3, 0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "needs at least one row"), ((5, -1), r"data\.seed=-1 is negative")],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataOrder(*arguments)


def test_bad_cursor():
    with pytest.raises(ValueError, match="cursor=-1"):
        DataOrder(3).take(-1, 2)
