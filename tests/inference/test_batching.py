import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.inference.batching import group_by_length


@given(
    st.lists(st.integers(1, 50), max_size=40),
    st.integers(1, 200),
    st.floats(0, 1),
)
def test_every_sequence_is_in_one_batch_within_the_bounds(lengths, max_tokens, max_padding):
    batches = group_by_length(lengths, max_tokens=max_tokens, max_padding=max_padding)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        rectangle = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or rectangle <= max_tokens
        assert rectangle - sum(lengths[index] for index in batch) <= max_padding * rectangle


def test_the_longest_come_first_and_equal_lengths_in_order():
    assert group_by_length([3, 5, 3, 5, 1], max_tokens=10, max_padding=1) == [[1, 3], [0, 2, 4]]


def test_padding_is_bounded_by_more_batches():
    assert group_by_length([100, 10, 10], max_tokens=1000, max_padding=1) == [[0, 1, 2]]
    assert group_by_length([100, 10, 10], max_tokens=1000) == [[0], [1, 2]]
    assert group_by_length([4, 3], max_tokens=1000, max_padding=0) == [[0], [1]]


def test_a_sequence_longer_than_a_batch_is_one_by_itself():
    assert group_by_length([20, 3, 3], max_tokens=6) == [[0], [1, 2]]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([3], {"max_tokens": 0}, "max_tokens must be at least 1"),
        ([3], {"max_tokens": 9, "max_padding": 1.5}, "max_padding lie between 0 and 1"),
        ([3, 0], {"max_tokens": 9}, "sequence 1 has none"),
    ],
)
def test_bounds_that_make_no_sense_are_refused(lengths, options, message):
    with pytest.raises(ValueError, match=message):
        group_by_length(lengths, **options)
