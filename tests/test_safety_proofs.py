"""The proofs of the safety controller in small; `./vla bench safety` runs them in full. No time is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import coal
import numpy as np
import pinocchio
import pytest
from proofs import adversarial, compare, fuzz, leaving, soak, stopping
from proofs.cells import Rig, judge_limits, judge_paths, load_cell, load_oracle, needed, random_start, watched
from proofs.drives import ONE_ARM, TWO_ARMS
from proofs.servo import ServoRig
from vla_control.command import ArmCommand, CommandRefused
from vla_control.safety import State
from vla_core.kinematics import Kinematics

CELLS = ("panda", "dual_panda")


# -------------------------------------------------------------------------------------------------------- the judges


@pytest.mark.parametrize("name", CELLS)
def test_the_oracle_stands_where_the_kinematics_does(name):
    oracle = load_oracle(name)
    kinematics = Kinematics(oracle.robot)
    rng = np.random.default_rng(0)
    for _ in range(20):
        position = {a.name: rng.uniform(a.limits.lower, a.limits.upper) for a in oracle.robot.arms}
        q = oracle.configuration(position)
        pinocchio.framesForwardKinematics(oracle.model, oracle.data, q)
        for arm in oracle.robot.arms:
            place = oracle.data.oMf[oracle.model.getFrameId(arm.tool.link)].homogeneous @ arm.tool.T_link_tool
            np.testing.assert_allclose(place, kinematics.forward(arm.name, position[arm.name]), atol=1e-9)


def test_the_oracle_measures_the_meshes_of_the_file():
    """One pair of links against coal's own loader, triangle by triangle."""
    oracle = load_oracle("panda")
    file = str(oracle.robot.parts[0].file)
    folder = file.split("/example-robot-data/")[0]
    model = pinocchio.buildModelFromUrdf(file)
    geometry = pinocchio.buildGeomFromUrdf(model, file, pinocchio.GeometryType.COLLISION, package_dirs=[folder])
    data, places = model.createData(), geometry.createData()
    pair = next(k for k, p in enumerate(oracle.pairs) if p.name == "panda_link2 - panda_hand")
    things = [next(o for o in geometry.geometryObjects if o.name == n) for n in ("panda_link2_0", "panda_hand_0")]
    fingers = [o for o in geometry.geometryObjects if "finger" in o.name]
    rng = np.random.default_rng(1)
    arm = oracle.robot.arms[0]
    for _ in range(10):
        position = rng.uniform(arm.limits.lower, arm.limits.upper)
        q = pinocchio.neutral(model)
        q[: len(position)] = position
        for name, value in arm.gripper.positions(1.0).items():
            q[model.joints[model.getJointId(name)].idx_q] = value
        pinocchio.updateGeometryPlacements(model, data, geometry, places, q)
        found = []
        for thing in (things[1], *fingers):
            ends = []
            for end in (things[0], thing):
                place = places.oMg[geometry.getGeometryId(end.name)]
                ends += [end.geometry, coal.Transform3s(place.rotation, place.translation)]
            result = coal.DistanceResult()
            coal.distance(*ends, coal.DistanceRequest(), result)
            found.append(result.min_distance)
        expected, measured = min(found), oracle.distances({"arm": position})[pair]
        if expected > 0.0:
            assert measured == pytest.approx(expected, abs=1e-5)
        else:
            assert measured <= 1e-6


def test_a_path_is_measured_as_its_points_are():
    oracle = load_oracle("panda")
    rng = np.random.default_rng(2)
    path = oracle.robot.arms[0].home + np.cumsum(0.01 * rng.normal(size=(150, 7)), axis=0)
    alone = np.array([oracle.distances({"arm": q}) for q in path])
    together = oracle.path_distances({"arm": path}, between=1)[::2]
    near = alone < 0.1
    assert near.any()
    assert np.abs(together - alone)[near].max() < 1e-5
    assert (together <= alone + 1e-5).all()  # what is far is bounded from below


def test_every_pair_that_may_meet_is_judged():
    oracle = load_oracle("dual_panda")
    names = {frozenset(pair.links) for pair in oracle.pairs}
    left = {link for link in oracle.carriers if link.startswith("left_") and link in set().union(*names)}
    right = {link for link in oracle.carriers if link.startswith("right_") and link in set().union(*names)}
    fixed = {link for link, carrier in oracle.carriers.items() if carrier == 0}
    for one in left:
        for two in right:
            assert frozenset((one, two)) in names or {one, two} <= fixed
    assert frozenset(("left_panda_link2", "left_panda_link5")) in names
    assert frozenset(("left_panda_link2", "left_panda_link3")) not in names
    assert frozenset(("left_panda_link1", "left_panda_link0")) not in names


def test_the_judge_of_limits_sees_each_kind():
    limits = load_cell("panda").arms[0].limits
    period, n = 0.01, 7
    still = np.zeros((20, n)) + 0.5 * (limits.lower + limits.upper)
    assert not any(judge_limits(still, limits, period)[0].values())
    beyond = still.copy()
    beyond[10:, 3] = limits.upper[3] + 0.01
    assert judge_limits(beyond, limits, period)[0]["position"] == 1
    back = np.repeat(limits.upper + 0.05 - 1e-5 * np.arange(20)[:, None], 1, axis=1)
    assert judge_limits(back, limits, period)[0]["position"] == 0
    for kind, order in (("velocity", 1), ("acceleration", 2), ("jerk", 3)):
        most = getattr(limits, kind)[0]
        for share, expected in ((0.999, False), (1.01, True)):
            path = still.copy()
            path[:, 0] += share * most * np.cumsum(period**order * np.ones(20)) ** 1 if order == 1 else 0.0
            if order > 1:
                rate = np.zeros(20)
                rate[10] = share * most * period**order
                for _ in range(order):
                    rate = np.cumsum(rate)
                path[:, 0] += rate
            assert (judge_limits(path, limits, period)[0][kind] > 0) == expected, (kind, share)


# ------------------------------------------------------------------------------------------------------- the proofs


@pytest.mark.parametrize("name, runs", [("panda", len(ONE_ARM)), ("dual_panda", len(TWO_ARMS))])
def test_nothing_is_run_into(name, runs):
    for run in range(runs):
        verdict = adversarial.run_attack(name, run, seconds=2.0)
        assert verdict.penetrations == 0, verdict
        assert verdict.short <= adversarial.SLACK, verdict
        assert not any(verdict.violations.values()), verdict
        assert verdict.travel > 0.2, verdict


@pytest.mark.parametrize("name", CELLS)
def test_fuzzed_commands_break_no_limit(name):
    verdict = fuzz.run_fuzz(name, seed=0, commands=6000)
    assert verdict.passed, verdict
    assert verdict.worst["jerk"] > 0.5  # it did use what it may
    assert verdict.taken > 0.3 * verdict.periods
    assert verdict.states.keys() >= {"RUNNING", "STOPPING"}
    assert verdict.refusals.keys() >= {"arms", "frame", "jump", "not_finite", "order", "period", "size", "stale"}


def test_a_joint_that_comes_back_from_outside_leads_no_other_over_its_limit():
    """A run in which a joint, on its way back while the arms braked, took another 10 urad over."""
    verdict = fuzz.run_fuzz("dual_panda", 16, 5000)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", CELLS)
def test_a_dead_policy_stops_all_arms_together(name):
    for run in range(6):
        verdict = stopping.run_kill(name, run)
        assert verdict.passed, verdict
        assert verdict.speed > 0.05, verdict


@pytest.mark.parametrize("kind", leaving.KINDS)
def test_the_way_out_is_open_and_the_way_in_is_not(kind):
    for run in range(2):
        verdict = leaving.run_leave("panda", leaving.KINDS.index(kind) + 4 * run)
        assert verdict.passed, verdict


def test_joints_that_accelerate_apart_bring_a_tool_back_inside_its_wall():
    """A run in which each joint's acceleration limit by itself turned the way inside into one along the wall."""
    verdict = leaving.run_leave("panda", 173)
    assert verdict.passed, verdict


def test_links_come_no_nearer_where_their_capsules_would_let_them():
    """A run in which a hand went round its own forearm's capsule, too near already, to where the capsule fits best."""
    verdict = leaving.run_leave("dual_panda", 266)
    assert verdict.passed, verdict


@pytest.mark.parametrize("name", CELLS)
def test_motion_begins_where_the_arms_are_or_not_at_all(name):
    found = [stopping.run_resume(name, run) for run in range(8)]
    assert all(verdict.passed for verdict in found), found
    assert any(verdict.refused and not verdict.began for verdict in found)
    assert any(verdict.began for verdict in found)


@pytest.mark.parametrize("name", CELLS)
def test_arms_that_lag_are_sent_the_same(name):
    for run in range(2):
        verdict = stopping.run_lag(name, run, seconds=2.0)
        assert verdict.passed, verdict


# ------------------------------------------------------------------------------------------------------ the baseline


def test_servo_slows_down_as_its_law_says():
    robot, oracle = load_cell("panda"), load_oracle("panda")
    rig = ServoRig(robot, oracle, collision_rate=100.0)
    nearest = {"self": 1.0, "scene": 1.0}
    fake = np.ones(len(oracle.pairs))
    scene = np.array([not pair.links[1] for pair in oracle.pairs])
    rig.oracle = SimpleNamespace(distances=lambda position: fake)
    for own, around, expected in (
        (1.0, 1.0, 1.0), (0.01, 1.0, 1.0), (0.005, 1.0, 0.001**0.5), (1.0, 0.01, 0.001**0.5), (0.0, 1.0, 0.0),
        (1e-12, 1.0, 0.001), (1.0, -0.01, 0.0),
    ):  # fmt: skip
        fake[:], fake[scene] = own, around
        assert rig._collision() == pytest.approx(expected, rel=1e-6), (own, around)
    assert nearest


def test_servo_halts_at_joint_margins_and_keeps_velocity_limits():
    robot, oracle = load_cell("panda"), load_oracle("panda")
    arm = robot.arms[0]
    rig = ServoRig(robot, oracle, start={"arm": arm.home})
    rig.step_parts({"arm": ArmCommand(delta=np.array([0.0, 0.02, 0.0, 0.0, 0.0, 0.0]))})
    step = np.abs(np.diff(rig.paths[0].array("arm"), axis=0))
    assert (step <= arm.limits.velocity * rig.period + 1e-12).all()
    assert step.max() > 0.0
    start = arm.home.copy()
    start[6] = arm.limits.upper[6] - 0.09
    rig = ServoRig(robot, oracle, start={"arm": start})
    goal = start.copy()
    goal[6] += 0.05
    goal[0] += 0.05
    rig.step_parts({"arm": ArmCommand(joints=goal)})
    assert np.array_equal(rig.position["arm"], start)


def test_an_errand_is_run_under_every_system():
    for system in compare.SYSTEMS:
        errand = compare.run_errand(system, "panda", 0)
        assert errand.straight < errand.time < 5.0, (system, errand)


# ---------------------------------------------------------------------------------------------------------- the soak


def test_whose_an_overrun_is():
    period, count = 0.005, 1000
    begin = np.arange(count) * period
    begin[500:] += 0.012  # another's: the step itself was quick
    begin[600:] += 0.012  # the machine's: the same step is slow only live
    begin[700:] += 0.012  # the controller's: it is slow whenever it is made
    begin[800:] += 0.012  # the machine's: slow live and in one replay of two
    own, first, second = np.full((3, count), 0.001)
    own[[599, 699, 799]] = 0.013
    first[[699, 799]] = 0.013
    second[699] = 0.012
    steps, *replays = (np.stack([begin, t, t, np.arange(count)], axis=1) for t in (own, first, second))
    replays[1][:, 0] += 1e4
    replays[1][3, 3] += 1.0
    memory = np.stack([np.linspace(0.0, 3600.0, 50), np.linspace(100.0, 101.0, 50)], axis=1)
    seen = {"began": 0.0, "ended": 3600.0, "states": {"2": 90, "3": 10}, "nearest": 0.03, "reasons": {}}
    report = soak.judge_soak(steps, replays, begin, memory, period, seen)
    assert report["overruns"] == 4 and report["overruns_by_own_time"] == 3
    assert report["overruns_of_controller"] == 1
    assert report["steps_over_period_by_own_time"] == 3
    assert report["replay_ms"] == [1.0, 1.0, 12.0] and report["replay_differs"] == 1
    assert report["overruns_replay_ms"] == pytest.approx([1.0, 11.78, 12.0])
    assert report["running"] == 0.9
    assert report["memory_growth_mb_per_hour"] == pytest.approx(1.0, abs=0.05)
    one = soak.judge_soak(steps, replays[:1], begin, memory, period, seen)
    assert one["overruns_of_controller"] == 2 and one["replay_differs"] == 0
    with pytest.raises(RuntimeError, match="1000 steps in a replay"):
        soak.judge_soak(steps, [replays[0][1:]], begin, memory, period, seen)


def test_a_recorded_run_is_replayed_bit_for_bit(tmp_path):
    """Armed, moved, stopped, disarmed and armed again, with refusals and an exception on the way."""
    rig, times = Rig(load_cell("panda"), armed=False), np.full((300, 4), np.nan)
    with (tmp_path / "calls").open("wb") as file:
        rig.controller = soak.Recorder(rig.controller, file, times)
        rig.arm()

        def move(steps: int) -> None:
            for k in range(steps):
                command = rig.command({"arm": ArmCommand(delta=np.array([0.001, 0.002, -0.001, 0.0, 0.002, 0.0]))})
                if k % 10 == 3:
                    rig.controller.offer(replace(command, sequence=command.sequence - 1), rig.now)
                measured = rig.measured
                rig.step(command, measured)
                measured.position["arm"][:] = 0.0  # as a node may: the recording must have it as it was

        move(60)
        with pytest.raises(CommandRefused):
            rig.controller.arm(rig.measured)
        with pytest.raises(TypeError):
            rig.controller.step(None, None, "no time")
        rig.controller.stop(2, "a test", "stop")
        move(60)
        rig.arm()
        move(20)
        rig.controller.disarm()
        move(60)
    steps, again = soak.made(times), soak.replay(tmp_path / "calls")
    assert len(steps) == len(again) == 201
    assert {d.state for d in rig.history} == set(State) - {State.ARMED, State.HOLDING, State.FAULT}
    assert len(np.unique(steps[:, 3])) > 80 and (steps[:, 3] == -1).sum() == 1
    assert (steps[:, 3] == again[:, 3]).all()
    assert (again[:, 1:3] > 0.0).all()


@pytest.mark.slow
def test_the_real_node_runs_on():
    report = soak.measure_soak("dual_panda", 0.2, rate=100.0)
    assert report["running"] > 0.5, report
    assert report["steps"] > 200
    assert report["replay_differs"] == 0
    json.dumps(report)


# --------------------------------------------------------------------------------------------------------- the tools


def test_a_start_is_free_and_a_lagging_rig_lags():
    robot, oracle = load_cell("panda"), load_oracle("panda")
    position = random_start(oracle, np.random.default_rng(3))
    assert (oracle.distances(position) > needed(oracle)).all()
    assert watched(oracle).any()
    rig = Rig(robot, lag=3)
    for _ in range(10):
        rig.step(rig.command({"arm": ArmCommand(delta=np.array([0.0, 0.001, 0.0, 0.0, 0.0, 0.0]))}))
    sent = rig.paths[0].array("arm")
    np.testing.assert_array_equal(rig.measured.position["arm"], sent[-4])
    assert not any(judge_paths(rig)[0].values())
    assert replace(rig.measured, stamp=0.0).stamp == 0.0
