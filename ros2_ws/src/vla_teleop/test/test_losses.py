"""Sequence numbers tell exactly which messages never came."""

from hypothesis import given
from hypothesis import strategies as st
from vla_teleop.losses import LossCounter


@given(st.sets(st.integers(1, 60), min_size=1), st.randoms())
def test_gaps_are_counted_whatever_the_order(arrived, random):
    order = sorted(arrived)
    first, rest = order[0], order[1:]
    random.shuffle(rest)
    counter = LossCounter()
    for sequence in [first, *rest]:
        counter.saw("/topic", b"a", sequence)
    assert counter.lost().get("/topic", 0) == max(arrived) - first + 1 - len(arrived)


def test_publishers_of_one_topic_are_told_apart():
    counter = LossCounter()
    for publisher, sequence in ((b"a", 1), (b"b", 100), (b"a", 2), (b"b", 103)):
        counter.saw("/topic", publisher, sequence)
    assert counter.lost() == {"/topic": 2}


def test_without_numbers_nothing_is_claimed():
    counter = LossCounter()
    counter.saw("/topic", b"a", None)
    assert counter.lost() == {}
