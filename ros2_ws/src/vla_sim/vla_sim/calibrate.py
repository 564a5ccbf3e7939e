"""Calibration files of a simulated robot from the true camera poses: `python -m vla_sim.calibrate --robot panda`.

A camera that moves with an arm is written relative to that arm's tool frame, any other to the base frame.
"""

from __future__ import annotations

import argparse

import numpy as np
from vla_calibration.files import CameraCalibration, save_camera
from vla_core import se3

from vla_sim.world import World, make_world


def calibration(world: World, camera: str) -> CameraCalibration:
    """The true calibration of a camera of the robot."""
    described = world.robot.camera(camera)
    arm = world.carrier(camera)
    T_base_camera = world.extrinsics(camera)
    if arm is None:
        parent, T = world.robot.base_frame, T_base_camera
    else:
        parent = world.robot.arm(arm).tool.frame
        T = se3.inverse(world.tool_pose(arm)) @ T_base_camera
    return CameraCalibration(
        camera=camera,
        width=described.width,
        height=described.height,
        K=world.intrinsics(camera),
        distortion=np.zeros(5),
        parent=parent,
        T_parent_camera=np.round(T, 9),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the calibration files of a simulated robot.")
    parser.add_argument("--robot", default="panda", help="robot description, name or file")
    world = make_world(parser.parse_args().robot)
    for camera in world.robot.cameras:
        if camera.calibration is not None:
            save_camera(camera.calibration, calibration(world, camera.name))
            print(f"{camera.name}: {camera.calibration}")


if __name__ == "__main__":
    main()
