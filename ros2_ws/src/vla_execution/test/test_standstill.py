import math

import pytest
from vla_execution.standstill import Standstill


def test_nothing_was_executed_before_the_first_motion():
    still = Standstill()
    assert still.within(3.0, 4.0) == pytest.approx(1.0)


def test_only_the_time_without_execution_counts():
    still = Standstill()
    for now, holds in ((1.0, False), (2.0, False), (3.0, True), (3.5, True), (4.0, False)):
        still.update(now, holds)
    assert still.within(0.5, 5.0) == pytest.approx(0.5 + 1.0)
    assert still.within(3.2, 3.6) == pytest.approx(0.4)
    assert still.within(1.5, 2.5) == 0.0
    assert still.within(4.5, 9.0) == 0.0


def test_an_open_interval_counts_to_now():
    still = Standstill()
    still.update(1.0, False)
    still.update(2.0, True)
    assert still.within(1.5, 2.75) == pytest.approx(0.75)
    assert math.isfinite(still.within(0.0, 10.0))
