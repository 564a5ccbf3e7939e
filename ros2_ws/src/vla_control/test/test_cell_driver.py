"""All arms of a robot as one cell: what is sent when, and what stops whom. Fake drivers, some of which misbehave."""

import threading
import time

import numpy as np
import pytest
from vla_control.cell_driver import CellDriver, make_drivers
from vla_control.drivers import ArmTarget, DriverError
from vla_control.safety import State
from vla_core.robot import RobotError, load_robot

#: A deadline, not an expectation, s.
PATIENCE = 30.0


class Cell:
    """A cell of fake arms on a clock of its own, and a controller that says what it is told to."""

    def __init__(self, robot, watchdog=0.1, drivers=None):
        self.robot, self.now = robot, 100.0
        self.drivers = drivers or make_drivers(robot, "fake", self.time)
        self.sent = {name: [] for name in self.drivers}
        self.calls = []
        for name, driver in self.drivers.items():
            self._watch(name, driver)
        self.cell = CellDriver(robot, self.drivers, watchdog, self.time)
        self.state, self.category, self.begun = State.DISARMED, -1, None
        self.goals = {arm.name: arm.home.copy() for arm in robot.arms}
        self.talks, self.aims, self.reading = True, set(self.drivers), None

    def _watch(self, name, driver):
        send, stop, close = driver.send, driver.stop, driver.close

        def sending(target):
            self.sent[name].append(target)
            send(target)

        def stopping(category):
            self.calls.append((name, category))
            return stop(category)

        def closing():
            self.calls.append((name, "close"))
            close()

        driver.send, driver.stop, driver.close = sending, stopping, closing

    def time(self):
        return self.now

    def period(self, count=1):
        """Let periods pass, in each of which the controller says its state and its targets."""
        for _ in range(count):
            self.now += self.cell.period
            if self.talks:
                self.cell.status(self.state, self.category, self.now)
            if self.state in (State.ARMED, State.RUNNING, State.HOLDING, State.STOPPING, State.STOPPED):
                for name in self.aims:
                    self.cell.target(name, ArmTarget(self.goals[name].copy(), np.zeros(6), 0.5), self.now)
            self.settle()
            self.reading = self.cell.tick()
        return self.reading

    def settle(self):
        """Until the arms' threads have nothing to do."""
        self.until(lambda: not any(arm.asked() or arm.call for arm in self.cell._arms.values()))

    def until(self, holds):
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end
            time.sleep(0.0005)

    def follow(self):
        """Connected, armed, and following."""
        assert self.cell.connect() == ""
        self.period(2)
        self.state = State.ARMED
        self.period(3)
        assert self.cell.following and not any(self.reading.halted.values())

    def stopped(self, category):
        """Which arms were stopped with a category."""
        return {name for name, done in self.calls if done == category}


@pytest.fixture
def aloha_cell(aloha):
    made = Cell(aloha)
    yield made
    made.cell.close()


BOTH = {"left", "right"}


def test_nothing_is_sent_before_the_controller_is_armed(aloha_cell):
    cell = aloha_cell
    assert cell.cell.connect() == ""
    for state in (State.DISARMED, State.STOPPED, State.FAULT, State.STOPPING):
        cell.state = state
        cell.goals["left"] = cell.robot.arms[0].home + 0.5
        cell.period(3)
    assert cell.sent == {"left": [], "right": []} and not cell.calls
    assert cell.reading.halted == {"left": "", "right": ""}
    np.testing.assert_allclose(cell.reading.states["left"].position, cell.robot.arms[0].home)


def test_the_arms_follow_targets_and_brake_with_the_controller(aloha_cell):
    cell = aloha_cell
    cell.follow()
    for state in (State.ARMED, State.RUNNING, State.HOLDING, State.STOPPING, State.STOPPED):
        cell.state = state
        cell.goals["right"] = cell.goals["right"] + 0.01
        cell.period(2)
        np.testing.assert_array_equal(cell.sent["right"][-1].position, cell.goals["right"])
        np.testing.assert_allclose(cell.reading.states["right"].position, cell.goals["right"])
    assert not cell.calls
    cell.state, count = State.DISARMED, len(cell.sent["left"])
    cell.period(30)
    assert len(cell.sent["left"]) == count and not cell.calls, "disarmed, the arms stay by themselves"
    cell.state = State.ARMED
    cell.period(2)
    assert len(cell.sent["left"]) > count


@pytest.mark.parametrize("ceases", ["targets of one arm", "targets", "status"])
def test_what_ceases_stops_all_arms(aloha_cell, ceases):
    cell = aloha_cell
    cell.follow()
    cell.state = State.RUNNING
    if ceases == "status":
        cell.talks = False
    else:
        cell.aims = {"left"} if ceases == "targets of one arm" else set()
    cell.period(9)
    assert cell.calls == []
    cell.period(3)
    assert cell.stopped(2) == BOTH and len(cell.calls) == 2
    wanted = "safety status" if ceases == "status" else "joint targets"
    assert all(wanted in why and "none for 0.1 s" in why for why in cell.reading.halted.values())
    cell.talks, cell.aims = True, set(BOTH)
    sent = len(cell.sent["left"])
    cell.period(20)
    assert len(cell.sent["left"]) == sent, "it stays stopped until connect"
    assert "running" in cell.cell.connect()
    cell.state = State.STOPPED
    cell.period()
    assert cell.cell.connect() == ""
    cell.state = State.ARMED
    cell.period(2)
    assert cell.cell.following and len(cell.sent["left"]) > sent


@pytest.mark.parametrize(("category", "worse"), [(1, 0), (0, 0)])
def test_a_stop_with_power_off_is_handed_on_once(aloha_cell, category, worse):
    cell = aloha_cell
    cell.follow()
    cell.state, cell.category = State.STOPPED, category
    cell.period(5)
    assert sorted(cell.calls) == [("left", category), ("right", category)]
    cell.category = worse
    cell.period(5)
    assert cell.stopped(0) == BOTH and len(cell.calls) == (2 if worse == category else 4)
    assert cell.cell.connect() == ""
    cell.period(5)
    assert set(cell.reading.halted.values()) == {""}, "the same stop, still latched, does not stop it again"
    cell.state, cell.category = State.ARMED, -1
    cell.period(3)
    assert cell.cell.following


def test_a_fault_of_the_controller_stops_the_arms(aloha_cell):
    cell = aloha_cell
    cell.follow()
    cell.state = State.FAULT
    cell.period(2)
    assert cell.stopped(2) == BOTH and "fault" in cell.reading.halted["left"]


@pytest.mark.parametrize("call", ["read", "send"])
@pytest.mark.parametrize("error", [DriverError("arm left: cable pulled"), KeyError("a driver's own mistake")])
def test_one_arm_that_fails_stops_both(aloha_cell, call, error):
    cell = aloha_cell
    cell.follow()
    cell.state = State.RUNNING
    whole = getattr(cell.drivers["left"], call)

    def failing(*_):
        raise error

    setattr(cell.drivers["left"], call, failing)
    cell.period(2)
    assert cell.stopped(2) == BOTH
    halted = cell.reading.halted
    assert halted["left"].startswith("arm left: ") and halted["right"] == f"stopped with {halted['left']}"
    assert np.isnan(cell.reading.stamp) and set(cell.reading.states) == {"right"}
    assert cell.cell.errors == {"left": 1}
    setattr(cell.drivers["left"], call, whole)
    cell.state = State.STOPPED
    cell.period()
    assert cell.cell.connect() == ""
    cell.state = State.ARMED
    cell.period(3)
    assert cell.cell.following and set(cell.reading.halted.values()) == {""}


def test_an_arm_that_halts_by_itself_is_the_controllers_matter(aloha_cell):
    cell = aloha_cell
    cell.follow()
    cell.drivers["left"]._follows, cell.drivers["left"]._halted = False, "protective stop"
    cell.goals["right"] = cell.goals["right"] + 0.01
    cell.period(5)
    assert cell.reading.halted == {"left": "protective stop", "right": ""}
    assert not cell.calls and cell.cell.following
    np.testing.assert_array_equal(cell.sent["right"][-1].position, cell.goals["right"])


def test_a_first_target_far_from_the_arm_is_not_sent(aloha_cell):
    cell = aloha_cell
    assert cell.cell.connect() == ""
    cell.period(2)
    cell.goals["right"] = cell.goals["right"] + 0.1
    cell.state = State.ARMED
    cell.period(3)
    assert cell.sent["right"] == [] and cell.stopped(2) == BOTH
    allowed = 2.0 * cell.robot.arm("right").start.joint
    assert f"arm right: expected a first target within {allowed:g} rad" in cell.reading.halted["left"]


def test_a_target_from_before_arming_is_not_sent(aloha_cell):
    cell = aloha_cell
    assert cell.cell.connect() == ""
    cell.period(2)
    old = cell.now
    cell.cell.status(State.ARMED, -1, cell.now + 0.01)
    assert not cell.cell.target("left", ArmTarget(cell.goals["left"], np.zeros(6), 0.5), old)
    assert cell.cell.target("left", ArmTarget(cell.goals["left"], np.zeros(6), 0.5), cell.now + 0.01)


def test_an_arm_whose_read_is_slow_holds_up_no_other(aloha):
    cell = Cell(aloha, watchdog=1.0)
    try:
        cell.follow()
        let_go = threading.Event()
        read = cell.drivers["left"].read
        cell.drivers["left"].read = lambda: (let_go.wait(PATIENCE), read())[1]
        stamp = cell.reading.states["left"].stamp
        cell.settle = lambda: None
        for _ in range(50):
            before = len(cell.sent["right"])
            cell.period()
            cell.until(lambda n=before: len(cell.sent["right"]) > n)
        assert cell.reading.states["right"].stamp > stamp + 0.4
        assert cell.reading.stamp == stamp, "the older of the two"
        cell.period(60)
        assert "arm left: expected an end of read, found none for 1 s" in cell.reading.halted["left"]
        cell.until(lambda: ("right", 2) in cell.calls)
        let_go.set()
        cell.until(lambda: ("left", 2) in cell.calls)
    finally:
        let_go.set()
        cell.cell.close()


def test_one_arm_that_cannot_be_connected_is_said_and_the_other_holds(aloha_cell):
    cell = aloha_cell
    connect = cell.drivers["right"].connect

    def failing():
        raise DriverError("arm right: no power")

    cell.drivers["right"].connect = failing
    assert cell.cell.connect() == "arm right: no power"
    cell.state = State.ARMED
    cell.period(3)
    assert cell.reading.halted == {"left": "", "right": "arm right: no power"} and np.isnan(cell.reading.stamp)
    assert not cell.cell.following and cell.sent["left"] == []
    cell.drivers["right"].connect = connect
    cell.state = State.DISARMED
    cell.period()
    assert cell.cell.connect() == "" and not cell.calls


def test_a_stop_during_connecting_is_done_after_it(aloha_cell):
    cell = aloha_cell
    let_go = threading.Event()
    connect = cell.drivers["left"].connect
    cell.drivers["left"].connect = lambda: (let_go.wait(PATIENCE), connect())[1]
    assert cell.cell.begin_connect() == ""
    assert "connecting already" in cell.cell.begin_connect()
    cell.cell.stop(1, "somebody says stop")
    let_go.set()
    cell.period()
    assert cell.stopped(1) == BOTH
    assert set(cell.reading.halted.values()) == {"somebody says stop"}


def test_closing_stops_and_lets_go_of_every_arm(aloha):
    cell = Cell(aloha)
    cell.follow()
    cell.cell.close()
    for name in BOTH:
        assert [done for own, done in cell.calls if own == name] == [2, "close"]
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("driver of")]


DRIVER = "    driver: {type: fake, speed: 2.0}\n"


@pytest.fixture
def described(tmp_path, aloha):
    """Writes ALOHA's description with a `driver` section of one's own for both arms, and loads it."""

    def write(driver):
        path = tmp_path / "own.yaml"
        path.write_text(
            aloha.path.read_text().replace("    tool:\n", driver + "    tool:\n", 1)
        )  # the right one merges
        return load_robot(path)

    return write


def test_drivers_are_made_as_the_description_says(described, aloha):
    drivers = make_drivers(described(DRIVER))
    assert set(drivers) == BOTH
    for name, driver in drivers.items():
        arm = aloha.arm(name)
        assert driver.arm.joints == arm.joints and driver.arm.period == 0.01 and driver.arm.gripper
        assert driver.config.speed == 2.0
    assert make_drivers(aloha) == {}, "no driver section: somebody else's node"
    assert make_drivers(described(DRIVER), "fake")["left"].config.speed == 3.0, "settings do not count"


def test_drivers_that_cannot_be_made_are_one_clear_error(described, aloha):
    with pytest.raises(RobotError, match="driver: expected one of .*fake.*found 'ur'"):
        make_drivers(aloha, "ur")
    with pytest.raises(DriverError, match="driver: expected one of .*found 'hand'"):
        make_drivers(described(DRIVER.replace("fake", "hand")))
    with pytest.raises(RobotError, match="arms.left.driver.period: unknown key"):
        make_drivers(described(DRIVER.replace("speed", "period")))
    with pytest.raises(RobotError, match="watchdog: expected more than a period, 0.01 s, found 0.01"):
        CellDriver(aloha, {}, watchdog=0.01)
