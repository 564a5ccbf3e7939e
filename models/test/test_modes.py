"""Where the demonstrations go left as often as right, heads that describe a distribution keep both ways."""

import pytest

torch = pytest.importorskip("torch")
from fork import KINDS, fork, shares  # noqa: E402

#: The others take minutes together.
QUICK = ("discrete tokens", "flow matching")
KEEP = [name for name in KINDS if name != "regression"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in KEEP])
def test_both_ways_are_kept(name):
    found = shares(fork(KINDS[name]))
    assert found["left"] >= 0.25 and found["right"] >= 0.25 and found["between"] <= 0.1, found


def test_a_regression_goes_between_them():
    found = shares(fork(KINDS["regression"]))
    assert found["between"] >= 0.9, found
