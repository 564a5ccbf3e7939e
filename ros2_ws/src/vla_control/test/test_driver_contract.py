"""What every arm driver keeps, whatever the hardware: the same checks of each of them with its emulated device.

Devices keep real time, and a check mostly waits: so several drivers are checked at once, each in a thread of its own,
and the files of tests of single drivers, which are slow, run beside them in processes of their own.
"""

import ast
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from driver_rig import Rig, drive, target
from rig_dynamixel import DynamixelRig
from rig_feetech import FeetechRig
from rig_franka import FrankaRig
from rig_mujoco import MujocoRig
from rig_piper import PiperRig
from rig_ros2_control import Ros2ControlRig
from rig_ur import UrRig
from rig_xarm import XarmRig
from vla_control.drivers import DRIVERS, DriverError, load_driver

HERE = Path(__file__).resolve().parent


class FakeRig(Rig):
    driver, boundary = "fake", "no device"
    joints, gripper, cuttable = 6, True, False

    def __init__(self) -> None:
        self.now, self.made = 0.0, None

    def config(self):
        return {"joints": [f"joint_{i}" for i in range(6)], "gripper": True, "start": (0.1, -0.2, 0.3, 0.0, 0.5, -0.6)}

    def time(self):
        return self.now

    def wait(self, duration):
        self.now += duration

    def position(self):
        self.made._move()
        return self.made._position.copy()

    def place(self, position):
        self.made._position = np.array(position)

    def cut(self):
        pass

    def mend(self):
        pass

    def moved_by_commands(self):
        return not np.allclose(self.made._target.position, self.position())

    def close(self):
        pass


#: Makes the rig of each driver, and of each mode of one; those of devices are in rig_<driver>.py.
RIGS = {
    "dynamixel": DynamixelRig,
    "fake": FakeRig,
    "feetech": FeetechRig,
    "franka": FrankaRig,
    "mujoco": MujocoRig,
    "piper": PiperRig,
    "ros2_control trajectory": partial(Ros2ControlRig, "trajectory"),
    "ros2_control position": partial(Ros2ControlRig, "position"),
    "ros2_control velocity": partial(Ros2ControlRig, "velocity"),
    "ros2_control pose": partial(Ros2ControlRig, "pose"),
    "ros2_control twist": partial(Ros2ControlRig, "twist"),
    "ur": UrRig,
    "xarm": XarmRig,
}


#: Drivers that are checked at once, the checks of one after each other; and files of tests beside them.
TOGETHER, BESIDE = 4, 4
#: What the contract does not say of drivers: files of slow tests, those that take longest first.
FILES = {
    "node": ["test_driver_node.py"],
    "servos": ["test_servo_bus.py", "test_dynamixel_driver.py", "test_feetech_driver.py"],
    "xarm": ["test_xarm_driver.py"],
    "ur": ["test_ur_driver.py"],
    "piper": ["test_piper_driver.py"],
    "franka": ["test_franka_driver.py"],
    "ros2_control": ["test_ros2_control_driver.py"],
}
#: Further modes of a driver keep to what they do differently.
MODES = ("ros2_control position", "ros2_control velocity", "ros2_control pose", "ros2_control twist")
OF_MODES = ("connecting", "the_arm_follows", "a_stop_ends_the_motion_until_connect 2", "an_arm_moved_by_hand")
#: Name -> check(rig, driver).
CHECKS: dict[str, Callable] = {}


def contract(*cases):
    """Makes a function a check, one for each case where there are some."""

    def register(check):
        for case in cases or (None,):
            name = check.__name__ + ("" if case is None else f" {case}")
            CHECKS[name] = check if case is None else partial(check, case=case)
        return check

    return register


class Checks:
    """Does what a session has selected, checks in threads and files in processes, and keeps what came of it.

    What fails is done again with nothing beside it, when all else has ended, and only that counts: all this goes on at
    once to save time, not to see what devices do without the processor time that they need.
    """

    def __init__(self, checks: list[tuple[str, str]], files: list[str]):
        #: By driver and check, and by the name of files.
        self.results = {what: Future() for what in (*checks, *files)}
        self._failed: list[tuple[str, str] | str] = []
        self._pools = [ThreadPoolExecutor(many) for many in (TOGETHER, BESIDE, 1)]
        together, beside, last = self._pools
        # Threads take drivers as they come: those whose checks take longest first.
        first = [
            together.submit(self._first, [pair for pair in checks if pair[0] == name])
            for name in sorted(RIGS, reverse=True)
        ]
        first += [beside.submit(self._first, [name]) for name in FILES if name in files]
        last.submit(self._again, first)

    def _first(self, group: list[tuple[str, str] | str]) -> None:
        for what in group:
            try:
                self.results[what].set_result(self._do(what))
            except pytest.skip.Exception as skip:
                self.results[what].set_exception(skip)
            except BaseException:
                self._failed.append(what)

    def _again(self, first: list[Future]) -> None:
        wait(first)
        for what in self._failed:
            warnings.warn(f"{what}: failed beside others, so it is done again alone", stacklevel=1)
            try:
                self.results[what].set_result(self._do(what))
            except BaseException as error:
                self.results[what].set_exception(error)

    def _do(self, what: tuple[str, str] | str) -> None:
        if isinstance(what, str):
            self._test(what)
        else:
            self._check(*what)

    def _check(self, name: str, check: str) -> None:
        rig = RIGS[name]()
        try:
            driver = load_driver(rig.driver, rig.config(), rig.time)
            if hasattr(rig, "made"):  # the device is inside the driver
                rig.made = driver
            try:
                CHECKS[check](rig, driver)
            finally:
                driver.close()
        finally:
            rig.close()

    def _test(self, name: str) -> None:
        command = [sys.executable, "-m", "pytest", "-m", "slow", *(str(HERE / file) for file in FILES[name])]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE)
        if done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
            pytest.skip(f"its vendor's library is not there: ./vla test -m slow {' '.join(FILES[name])}")
        assert done.returncode == 0, done.stdout

    def close(self) -> None:
        self._failed.clear()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def running(request):
    """The checks and files of this session, running."""

    def selected(function):
        items = [item for item in request.session.items if getattr(item, "originalname", "") == function]
        return [item.callspec.params for item in items]

    made = Checks(
        [(params["name"], params["check"]) for params in selected("test_contract")],
        [params["files"] for params in selected("test_what_the_contract_does_not_say")],
    )
    yield made
    made.close()


def follows_again(rig, driver, at):
    """Connected again the arm stays where it is, and then follows."""
    driver.connect()
    rig.wait(0.2)
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)
    drive(rig, driver, at + 0.1, duration=0.5)
    np.testing.assert_allclose(rig.position(), at + 0.1, atol=max(0.01, 3 * rig.resolution))


@contract()
def connecting_moves_nothing(rig, driver):
    before = rig.position()
    driver.connect()
    rig.wait(0.3)
    np.testing.assert_allclose(rig.position(), before, atol=2 * rig.resolution)
    assert not rig.moved_by_commands()


@contract()
def the_state_is_the_devices(rig, driver):
    driver.connect()
    rig.wait(0.1)
    begin = rig.time()
    state = driver.read()
    np.testing.assert_allclose(state.position, rig.position(), atol=2 * rig.resolution)
    assert state.velocity.shape == (rig.joints,) and np.isfinite(state.velocity).all()
    assert begin - 2.0 <= state.stamp <= rig.time() and state.halted == ""
    assert (state.effort is not None) == driver.capabilities.effort
    assert (state.wrench is not None) == driver.capabilities.wrench
    assert (state.gripper is not None) == driver.capabilities.gripper == rig.gripper


@contract()
def the_arm_follows_targets(rig, driver):
    driver.connect()
    goal = rig.position() + 0.2 * np.where(np.arange(rig.joints) % 2, -1, 1)
    drive(rig, driver, goal, duration=1.0)
    np.testing.assert_allclose(rig.position(), goal, atol=max(0.01, 3 * rig.resolution))
    np.testing.assert_allclose(driver.read().position, goal, atol=max(0.01, 3 * rig.resolution))


@contract()
def the_gripper_follows_its_opening(rig, driver):
    if not rig.gripper:
        pytest.skip("has no gripper")
    driver.connect()
    for opening in (0.2, 0.9):
        drive(rig, driver, rig.position(), duration=2.0, opening=opening)
        assert driver.read().gripper == pytest.approx(opening, abs=0.03)


@contract("nan", "inf", "short", "opening")
def a_target_that_is_not_sound_is_not_sent(rig, driver, case):
    driver.connect()
    wrong = rig.position() + 0.3
    opening = None
    if case == "short":
        wrong = wrong[:-1]
    elif case == "opening":
        opening = 1.5
    else:
        wrong[0] = float(case)
    with pytest.raises(ValueError, match="expected"):
        driver.send(target(wrong, opening))
    rig.wait(0.2)
    assert not rig.moved_by_commands()


@contract(2, 1, 0)
def a_stop_ends_the_motion_until_connect(rig, driver, case):
    driver.connect()
    drive(rig, driver, rig.position() + 0.5, duration=0.3)
    done = driver.stop(case)
    assert done in driver.capabilities.stops
    assert done <= case or done == min(driver.capabilities.stops)
    with pytest.raises(DriverError):
        driver.send(target(rig.position()))
    rig.wait(0.3)
    at = rig.position()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), at, atol=2 * rig.resolution)
    if rig.powered() is not None:
        assert rig.powered() == (done == 2)
    follows_again(rig, driver, at)


@contract()
def an_arm_moved_by_hand_stays_where_it_was_put(rig, driver):
    driver.connect()
    drive(rig, driver, rig.position() + 0.1, duration=0.5)
    driver.stop(2)
    driver.close()
    rig.place(rig.position() - 0.4)
    put = rig.position()
    driver.connect()
    rig.wait(0.5)
    np.testing.assert_allclose(rig.position(), put, atol=2 * rig.resolution)


@contract()
def a_pulled_cable_is_one_clear_error_and_connecting_again_works(rig, driver):
    if not rig.cuttable:
        pytest.skip("has no cable")
    driver.connect()
    rig.wait(0.1)
    rig.cut()
    with pytest.raises(DriverError, match=driver.arm.name):
        for _ in range(1000):
            driver.send(target(driver.read().position))
            rig.wait(driver.arm.period)
    driver.stop(0)
    driver.close()
    with pytest.raises(DriverError, match=driver.arm.name):
        driver.connect()
    rig.mend()
    before = rig.position()
    follows_again(rig, driver, before)


@contract()
def reading_and_sending_do_not_wait(rig, driver):
    driver.connect()
    rig.wait(0.1)
    waits = []
    for _ in range(50):
        begin = time.perf_counter()
        driver.send(target(driver.read().position))
        waits.append(time.perf_counter() - begin)
        rig.wait(driver.arm.period)
    # A period is 10 ms to 33 ms; what a vendor's call may block, 190 ms, would show in every one.
    assert np.median(waits) < 0.1


@contract()
def closing_twice_and_before_connecting_is_fine(_, driver):
    driver.close()
    driver.connect()
    driver.close()
    driver.close()
    with pytest.raises(DriverError):
        driver.read()


@pytest.mark.parametrize(
    ("name", "check"),
    [(n, c) for n in sorted(RIGS) for c in CHECKS if n not in MODES or c.startswith(OF_MODES)],
)
def test_contract(running, name, check):
    running.results[name, check].result()


@pytest.mark.parametrize("files", FILES)
def test_what_the_contract_does_not_say(running, files):
    running.results[files].result()


def test_there_is_a_rig_for_every_driver():
    assert {name.split()[0] for name in RIGS} == set(DRIVERS)


def test_every_library_of_a_driver_is_an_extra_of_the_package():
    tree = ast.parse((HERE.parent / "setup.py").read_text())
    extras = next(ast.literal_eval(k.value) for k in ast.walk(tree) if getattr(k, "arg", "") == "extras_require")
    assert extras == {name: [library] for name, (_, library) in DRIVERS.items() if library}
    pinned = "".join(path.read_text() for path in HERE.parents[2].glob("requirements*.txt"))
    assert not [library for _, library in DRIVERS.values() if library and f"\n{library}==" not in pinned]


def test_settings_that_are_not_known_are_refused():
    with pytest.raises(DriverError, match="expected one of .*found 'hand'"):
        load_driver("hand", {})
    with pytest.raises(DriverError, match="expected the settings joints.*found \\['joints', 'sped'\\]"):
        load_driver("fake", {"joints": ["a"], "sped": 1.0})
