"""The controllers of a UR5 as a ROS node on real topics: they take what ros2_controllers, MoveIt Servo and Cartesian
controllers take, integrate it, and publish joint states as joint_state_broadcaster does."""

from __future__ import annotations

import itertools
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from driver_rig import RealTimeRig
from vla_core.kinematics import Kinematics
from vla_core.robot import load_robot
from vla_core.se3 import pose_to_matrix

_NUMBER = itertools.count()
JOINTS = ["shoulder_pan_joint", "shoulder_lift_joint", "elbow_joint", "wrist_1_joint", "wrist_2_joint", "wrist_3_joint"]
#: An arm that is turned and lifted in its cell, so that base frame and base link differ.
DESCRIPTION = f"""
name: cell
base_frame: table
model:
  file: package://example_robot_data/robots/ur_description/urdf/ur5_gripper.urdf
  xyz: [0.2, -0.1, 0.3]
  rpy: [0.0, 0.0, 0.8]
rates: {{control: 100.0, observation: 30.0}}
cameras: {{}}
arms:
  left:
    joints: [{", ".join(JOINTS)}]
    home: [0.3, -1.2, 1.5, -1.3, -1.4, 0.2]
    limits:
      lower: [-6.2, -6.2, -3.1, -6.2, -6.2, -6.2]
      upper: [6.2, 6.2, 3.1, 6.2, 6.2, 6.2]
      velocity: [3.0, 3.0, 3.0, 3.0, 3.0, 3.0]
      acceleration: [10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    tool: {{link: tool0, xyz: [0.02, 0.0, 0.12], rpy: [0.0, 0.3, 0.0], speed: 1.0, rotation: 3.0}}
    workspace: {{lower: [-2.0, -2.0, -2.0], upper: [2.0, 2.0, 2.0]}}
"""


def description(folder: Path):
    path = folder / "cell.yaml"
    path.write_text(DESCRIPTION)
    return load_robot(path)


class Controllers:
    """The node. Joints are limited in speed; a trajectory's point is reached in its time, and twists are followed by
    the tip (the tool's link) in the arm's base, as a Cartesian controller has them. Fingers are at once where they are
    sent."""

    def __init__(self, node, mode: str, robot, names: str, arm: str = "left"):
        from geometry_msgs.msg import PoseStamped, TwistStamped
        from sensor_msgs.msg import JointState
        from std_msgs.msg import Float64MultiArray
        from trajectory_msgs.msg import JointTrajectory

        self.node, self.mode, self.robot = node, mode, robot
        self.lock = threading.RLock()
        arm = robot.arm(arm)
        self.names, self.fingers = list(arm.joints), arm.gripper.positions(1.0) if arm.gripper else {}
        self.kinematics = Kinematics(robot)
        self.T_base_link = np.asarray(robot.parts[0].T_base_part)
        self.T_tool_tip = np.linalg.inv(arm.tool.T_link_tool)
        self.joints, self.goal = arm.home.copy(), arm.home.copy()
        self.velocity, self.twist, self.until = np.zeros(6), np.zeros(6), 0.0
        self.fastest = 3.0
        self.open, self.elsewhere, self.ended, self.heard = True, False, False, []
        self.type = JointState
        self.states = node.create_publisher(JointState, f"{names}/joint_states", 1)
        kinds = {
            "trajectory": (JointTrajectory, self._trajectory), "position": (Float64MultiArray, self._position),
            "velocity": (Float64MultiArray, self._velocity), "pose": (PoseStamped, self._pose),
            "twist": (TwistStamped, self._twist),
        }  # fmt: skip
        kind, take = kinds[mode]
        self._make = lambda: node.create_subscription(kind, f"{names}/command", self._guard(take), 1)
        self.subscription = self._make()
        if self.fingers:
            node.create_subscription(Float64MultiArray, f"{names}/gripper", self._guard(self._grip), 1)
        self.time = time.monotonic()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def activate(self, active):
        """Whether the controller listens; in the thread that spins."""
        if active:
            self.subscription = self._make()
        else:
            self.node.destroy_subscription(self.subscription)

    def _guard(self, take):
        def taking(message):
            with self.lock:
                if self.open:
                    self.move()
                    self.heard.append(message)
                    take(message)

        return taking

    def _trajectory(self, message):
        point = message.points[-1]
        assert list(message.joint_names) == self.names and len(message.points) == 1
        self._aim(np.array(point.positions))
        self.until = time.monotonic() + point.time_from_start.sec + 1e-9 * point.time_from_start.nanosec

    def _position(self, message):
        self._aim(np.array(message.data))

    def _grip(self, message):
        self.fingers = dict(zip(self.fingers, message.data, strict=True))

    def _aim(self, goal):
        self.elsewhere = self.elsewhere or not np.allclose(goal, self.joints, atol=1e-4)
        self.goal = goal

    def _velocity(self, message):
        self.velocity = np.array(message.data)
        self.elsewhere = self.elsewhere or np.abs(self.velocity).max() > 1e-3

    def _pose(self, message):
        assert message.header.frame_id == "base_link"
        p, q = message.pose.position, message.pose.orientation
        T = self.T_base_link @ pose_to_matrix([p.x, p.y, p.z, q.x, q.y, q.z, q.w])
        found = self.kinematics.inverse("left", T @ np.linalg.inv(self.T_tool_tip), self.joints)
        assert found is not None
        self._aim(found)

    def _twist(self, message):
        assert message.header.frame_id == "base_link"
        v, w = message.twist.linear, message.twist.angular
        R = self.T_base_link[:3, :3]
        v, w = R @ [v.x, v.y, v.z], R @ [w.x, w.y, w.z]
        T = self.kinematics.forward("left", self.joints)
        v = v - np.cross(w, T[:3, :3] @ self.T_tool_tip[:3, 3])
        self.velocity = np.linalg.solve(self.kinematics.jacobian("left", self.joints), np.concatenate([v, w]))
        self.elsewhere = self.elsewhere or np.abs(self.velocity).max() > 1e-3

    def move(self):
        """Go on to now."""
        with self.lock:
            now = time.monotonic()
            step, most = now - self.time, self.fastest * (now - self.time)
            if self.mode in ("velocity", "twist"):
                change = np.clip(self.velocity * step, -most, most)
            elif self.mode == "trajectory" and self.until > now:
                change = (self.goal - self.joints) * step / (self.until - self.time)
            else:
                change = self.goal - self.joints
            self.joints = self.joints + np.clip(change, -most, most)
            self.speed = np.clip(change, -most, most) / step if step > 0.0 else np.zeros(6)
            self.time = now

    def _run(self):
        while not self.ended:
            time.sleep(0.005)
            with self.lock:
                self.move()
                # Names in an order of their own, and a joint that is not the arm's.
                message = self.type(name=["elsewhere", *self.names[::-1], *self.fingers])
                message.position = [0.0, *self.joints[::-1].tolist(), *self.fingers.values()]
                message.velocity = [0.0, *self.speed[::-1].tolist()] + [0.0] * len(self.fingers)
                message.effort = [float("nan")] * len(message.name)
                message.header.stamp = self.node.get_clock().now().to_msg()
            if self.open and not self.ended:
                self.states.publish(message)


class Ros2ControlRig(RealTimeRig):
    driver = "ros2_control"
    boundary = "real topics between real nodes; the controllers behind them are emulated"
    joints, gripper, resolution = 6, False, 1e-5

    def __init__(self, mode: str = "trajectory", **config):
        rclpy = pytest.importorskip("rclpy")
        from rclpy.node import Node
        from vla_ros.lean_executor import LeanExecutor

        self._rclpy, self.mode, self.extra = rclpy, mode, config
        self._folder = tempfile.TemporaryDirectory()
        self.robot = description(Path(self._folder.name))
        self.context = rclpy.Context()
        number = next(_NUMBER)
        rclpy.init(args=[], context=self.context, domain_id=27 + os.getpid() % 20)
        self.names = f"/rig_{os.getpid()}_{number}"
        self.node, self.own = Node("driver", context=self.context), Node("controllers", context=self.context)
        self.controllers = Controllers(self.own, mode, self.robot, self.names)
        self._asked = []
        self._executor = LeanExecutor(context=self.context)
        for node in (self.node, self.own):
            self._executor.add_node(node)
        self._thread = threading.Thread(target=self._spin, daemon=True)
        self._thread.start()

    def _spin(self):
        while not self.controllers.ended:
            self._executor.spin_once(timeout_sec=0.05)
            while self._asked:
                self._asked.pop(0)()

    def ask(self, call):
        """Let the thread that spins make a call: entities must not go while it waits for them."""
        done = threading.Event()
        self._asked.append(lambda: (call(), done.set()))
        assert done.wait(30.0)

    def config(self):
        return {
            "name": "left", "joints": JOINTS, "robot": self.robot, "node": self.node, "mode": self.mode,
            "command": f"{self.names}/command", "states": f"{self.names}/joint_states", "base_link": "base_link",
            # Far above what the hardware needs, since the machine that runs the tests may be busy.
            "tip": "link", "stale": 3.0, "patience": 10.0, **self.extra,
        }  # fmt: skip

    def position(self):
        self.controllers.move()
        return self.controllers.joints.copy()

    def place(self, position):
        time.sleep(0.05)  # a hand is slower than what is still on its way
        with self.controllers.lock:
            self.controllers.move()
            self.controllers.joints = np.array(position)
            self.controllers.goal = self.controllers.joints.copy()

    def moved_by_commands(self):
        return self.controllers.elsewhere

    def cut(self):
        self.controllers.open = False

    def mend(self):
        self.controllers.open = True

    def close(self):
        self.controllers.ended = True
        self.controllers.thread.join()
        self._thread.join()
        self._executor.shutdown()
        for node in (self.node, self.own):
            node.destroy_node()
        self._rclpy.shutdown(context=self.context)
        self._folder.cleanup()
