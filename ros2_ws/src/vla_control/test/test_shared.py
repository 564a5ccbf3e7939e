"""Between the callbacks and the loop: stops, enabling device, drivers, wrenches, and a controller that fails."""

import itertools
import threading

import numpy as np
import pytest
from vla_control.command import ArmCommand, Command, CommandRefused
from vla_control.safety import Measured, SafetyController, State
from vla_control.shared import QUEUE, SharedController
from vla_control.stops import Stops

ALL = ["panda", "aloha"]


class Breakable(SafetyController):
    """A controller with a fault in it: `broken` fails with a command, `dead` in every step."""

    broken = dead = False

    def step(self, command, measured, now):
        if self.dead or (self.broken and command is not None):
            raise ZeroDivisionError("a fault of the program")
        return super().step(command, measured, now)


class Cell:
    """A shared controller, arms that do what they are sent, a sender, and one clock."""

    def __init__(self, robot, stops=None, watch_drivers=False):
        self.controller = Breakable(robot)
        self.shared = SharedController(self.controller, stops, watch_drivers)
        self.robot, self.period, self.now = robot, self.controller.period, 100.0
        self.position = {a.name: np.array(a.home) for a in robot.arms}
        self.sequence = itertools.count(1)
        self.heartbeat = self.alive = True
        self.halted = dict.fromkeys(self.position, "")
        self.sent = []

    def measure(self):
        opening = {a.name: 0.5 for a in self.robot.arms if a.gripper}
        self.shared.joints(Measured(self.now, {n: q.copy() for n, q in self.position.items()}, opening))
        if self.heartbeat:
            self.shared.enable(True, self.now)
        if self.alive:
            self.shared.drivers(dict(self.halted), self.now)

    def arm(self):
        self.measure()
        self.shared.arm(self.now, self.now)

    def command(self, x=0.1, y=0.1):
        parts = {n: ArmCommand(delta=np.array([x, y, 0, 0, 0, 0]) * self.period) for n in self.position}
        return Command(self.now, next(self.sequence), "test", self.period, False, parts)

    def run(self, periods, driving=True, measuring=True):
        for _ in range(periods):
            self.now += self.period
            if measuring:
                self.measure()
            if driving:
                self.shared.command(self.command())
            self.newest = self.shared.step(self.now, self.now)
            for name, target in self.newest.decision.sent.items():
                self.position[name] = target.position.copy()
            self.sent.append(self.newest.decision.sent)
        return self.newest

    def events(self, kind):
        return [event for event in self.newest.decision.events if event.kind == kind]


@pytest.fixture(params=ALL)
def make(request):
    robot = request.getfixturevalue(request.param)
    return lambda *arguments, **settings: Cell(robot, *arguments, **settings)


def check_braking(cell, before):
    """From one period to the next all speeds go down, within the acceleration limits, to rest of both arms at once."""
    speeds = np.array([np.concatenate([s[n].velocity for n in cell.position]) for s in cell.sent[before - 1 :] if s])
    most = np.concatenate([arm.limits.acceleration for arm in cell.robot.arms]) * cell.period
    assert (np.abs(np.diff(speeds, axis=0)) <= most * 1.001).all()
    assert np.abs(speeds[0]).max() > 0.01 and (np.abs(speeds[-1]) <= most).all()  # the target at rest may go unsent


@pytest.mark.parametrize("category", [0, 1, 2])
def test_a_stop_takes_effect_in_the_very_next_period(make, category):
    cell = make(Stops(category))
    cell.arm()
    assert cell.run(40).decision.state == State.RUNNING
    assert cell.shared.stop(cell.shared.stops.topic()) in (State.STOPPING, State.STOPPED)
    decision = cell.run(1).decision
    assert decision.state in (State.STOPPING, State.STOPPED) and decision.stop_category == category
    assert not decision.sent if category == 0 else set(decision.sent) == set(cell.position)
    cell.run(200)
    assert cell.newest.decision.state == State.STOPPED and cell.newest.decision.reason == "emergency stop"
    assert bool(cell.newest.decision.sent) == (category == 2)
    assert cell.shared.counts().stopped == {"emergency_stop": 1}
    if category:
        check_braking(cell, 40)


def test_only_arming_ends_a_stop(make):
    cell = make()
    cell.arm()
    cell.run(40)
    cell.shared.stop(cell.shared.stops.service())
    with pytest.raises(CommandRefused, match="at rest"):
        cell.arm()
    assert cell.run(200).decision.state == State.STOPPED
    assert not any(target.velocity.any() for target in cell.newest.decision.sent.values())
    cell.arm()
    assert cell.run(40).decision.state == State.RUNNING


def test_letting_go_of_the_enabling_device_stops_both_arms_and_holding_it_again_moves_nothing(make):
    cell = make(Stops(2, enabling_device=True, enable_timeout=0.2))
    cell.arm()
    cell.run(40)
    cell.heartbeat = False
    silent = cell.now
    while cell.newest.decision.state == State.RUNNING:
        cell.run(1)
    assert cell.now - silent == pytest.approx(0.2 + 0.5 * cell.period, abs=0.6 * cell.period)
    assert "silent" in cell.newest.decision.reason
    cell.heartbeat = True
    cell.run(200)
    assert cell.newest.decision.state == State.STOPPED
    assert cell.shared.counts().stopped == {"enabling_device": 1}
    check_braking(cell, 40)
    cell.arm()
    assert cell.run(40).decision.state == State.RUNNING
    cell.shared.enable(False, cell.now)
    cell.heartbeat = False
    assert cell.run(1).decision.state == State.STOPPING and "released" in cell.newest.decision.reason


def test_without_the_enabling_device_it_is_not_armed(make):
    cell = make(Stops(2, enabling_device=True))
    cell.heartbeat = False
    with pytest.raises(CommandRefused, match="enabling_device.*nothing heard"):
        cell.arm()
    cell.heartbeat = True
    cell.arm()
    assert cell.shared.state == State.ARMED


def test_a_stop_while_disarmed_is_latched_too_and_an_enabling_device_matters_only_when_armed(make):
    cell = make(Stops(2, enabling_device=True))
    cell.heartbeat = False
    assert cell.run(30, driving=False).decision.state == State.DISARMED
    cell.shared.stop(cell.shared.stops.topic())
    assert cell.run(1).decision.state == State.STOPPED and not cell.newest.decision.sent


def test_it_is_not_armed_on_old_joint_states_or_without_its_drivers(make):
    cell = make(watch_drivers=True)
    with pytest.raises(CommandRefused, match="joint_states.*none have come"):
        cell.shared.arm(cell.now, cell.now)
    cell.alive = False
    with pytest.raises(CommandRefused, match="drivers.*none have come"):
        cell.arm()
    cell.alive = True
    cell.measure()
    with pytest.raises(CommandRefused, match="1.00 s old"):
        cell.shared.arm(cell.now + 1.0, cell.now)
    cell.halted[cell.robot.arm_names[-1]] = "protective stop"
    with pytest.raises(CommandRefused, match="protective stop"):
        cell.arm()


@pytest.mark.parametrize("fault", ["silent", "halted"])
def test_one_drivers_fault_stops_all_arms(make, fault):
    cell = make(watch_drivers=True)
    cell.arm()
    cell.run(40)
    if fault == "silent":
        cell.alive = False
        periods = round(cell.shared.limits.driver_timeout / cell.period) + 1
    else:
        cell.halted[cell.robot.arm_names[-1]], periods = "overload of joint 2", 1
    cell.run(periods)
    assert cell.newest.decision.state in (State.STOPPING, State.STOPPED)
    assert cell.shared.counts().stopped == {"driver": 1}
    cell.run(200)
    assert cell.newest.decision.state == State.STOPPED
    assert ("overload" in cell.newest.decision.reason) == (fault == "halted")


def test_drivers_are_not_watched_unless_asked_for(make):
    cell = make(watch_drivers=False)
    cell.alive = False
    cell.arm()
    assert cell.run(100).decision.state == State.RUNNING


def test_a_wrench_that_falls_silent_holds_the_arms(make):
    cell = make()
    cell.shared.wrench(cell.robot.arm_names[0], np.zeros(6), cell.now)
    cell.arm()
    assert cell.shared.felt == {cell.robot.arm_names[0]}
    cell.run(50)
    assert cell.newest.decision.state in (State.STOPPING, State.HOLDING)
    cell.shared.wrench(cell.robot.arm_names[0], np.zeros(6), cell.now + 1.0)
    assert cell.run(40).decision.state == State.RUNNING


def test_commands_between_two_periods_are_all_taken_and_those_before_arming_are_not(make):
    cell = make()
    for _ in range(5):
        cell.shared.command(cell.command())
    cell.arm()
    cell.now += cell.period
    assert cell.shared.step(cell.now, cell.now).decision.source == ""
    for _ in range(QUEUE + 3):
        cell.shared.command(cell.command(0.0, 0.0))
    cell.measure()
    assert cell.shared.step(cell.now, cell.now).decision.sequence == 5 + QUEUE + 3


def test_a_fault_of_the_program_brakes_within_the_limits_and_stops(make):
    cell = make()
    cell.arm()
    cell.run(40)
    cell.controller.broken = True
    period = cell.run(1)
    assert "ZeroDivisionError" in period.error and "Traceback" in period.error
    assert period.decision.state == State.STOPPING and set(period.decision.sent) == set(cell.position)
    cell.controller.broken = False
    assert not cell.run(200).error
    assert cell.newest.decision.state == State.STOPPED and "a fault of the program" in cell.newest.decision.reason
    assert cell.shared.counts().stopped == {"exception": 1}
    check_braking(cell, 40)
    cell.arm()
    assert cell.run(40).decision.state == State.RUNNING


def test_when_braking_fails_too_nothing_is_sent_any_more_and_nobody_arms(make):
    cell = make(watch_drivers=True)
    cell.arm()
    cell.run(40)
    cell.controller.dead = True
    period = cell.run(1)
    assert period.decision.state == State.FAULT and not period.decision.sent and period.error.count("Traceback") == 2
    assert [event.reasons for event in cell.events("stopped")] == [("exception",)]
    cell.controller.dead = False
    for _ in range(30):
        period = cell.run(1)
        assert period.decision.state == State.FAULT and not period.decision.sent and not period.error
        assert not period.decision.events
    with pytest.raises(CommandRefused, match="start it again"):
        cell.arm()
    assert cell.shared.disarm() == cell.shared.stop(cell.shared.stops.topic()) == State.FAULT
    assert "braking failed" in cell.shared.counts().reason


def test_a_fault_in_the_very_first_period_is_one_too(make):
    cell = make()
    cell.controller.dead = True
    assert cell.run(1).decision.state == State.FAULT


def test_an_exception_outside_the_step_stops_and_a_second_one_gives_up(make):
    cell = make()
    cell.arm()
    cell.run(40)
    assert "no memory" in cell.shared.fail(MemoryError("no memory"))
    assert cell.run(200).decision.state == State.STOPPED
    cell.shared.fail(MemoryError("no memory"))
    assert cell.run(1).decision.state == State.FAULT


def test_requests_from_other_threads_never_come_in_the_middle_of_a_step(make):
    """Whoever calls the controller while another thread is in it is found out."""
    cell = make()
    inside, clashes = [], []
    for name in ("step", "stop", "arm", "disarm", "offer"):
        method = getattr(cell.controller, name)

        def alone(*arguments, method=method, **settings):
            me = threading.get_ident()
            if any(other != me for other in inside):
                clashes.append(method.__name__)
            inside.append(me)
            try:
                return method(*arguments, **settings)
            finally:
                inside.pop()

        setattr(cell.controller, name, alone)
    ending = threading.Event()

    def callbacks():
        while not ending.is_set():
            for request in (lambda: cell.shared.arm(cell.now, cell.now), cell.shared.disarm, cell.shared.counts,
                            lambda: cell.shared.stop(cell.shared.stops.service())):  # fmt: skip
                try:
                    request()
                except CommandRefused:
                    pass
                ending.wait(0.0005)

    threads = [threading.Thread(target=callbacks) for _ in range(3)]
    cell.measure()
    for thread in threads:
        thread.start()
    try:
        cell.run(300)
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert clashes == []
