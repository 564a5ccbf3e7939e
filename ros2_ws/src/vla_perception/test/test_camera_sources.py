"""Pictures from files, and refusals of driver sections that are wrong."""

import sys
import types
from dataclasses import replace

import cv2
import numpy as np
import pytest
from perception_logs import robot
from vla_perception.camera_sources import CameraError, kernel_age, open_source

PICTURES = [np.full((24, 32, 3), (i * 40, 255 - i * 40, 7), np.uint8) for i in range(4)]


def camera(**driver):
    return replace(robot(["scene"], rate=500.0).cameras[0], driver=driver)


def read(source, count):
    pictures = [source.read().picture for _ in range(count)]
    source.close()
    return pictures


def test_folder_is_read_in_order_and_again(tmp_path):
    for i, picture in enumerate(PICTURES):
        cv2.imwrite(str(tmp_path / f"{i}.png"), cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    found = read(open_source(camera(type="file", path=str(tmp_path))), 6)
    np.testing.assert_array_equal(found, PICTURES + PICTURES[:2])


def test_video_is_read(tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 30, (32, 24))
    for picture in PICTURES:
        writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    writer.release()
    found = read(open_source(camera(type="file", path="v.avi"), tmp_path), 4)
    np.testing.assert_allclose(found, PICTURES, atol=12)


def test_bag_topic_is_read(tmp_path):
    from mcap.writer import Writer
    from rclpy.serialization import serialize_message
    from sensor_msgs.msg import Image

    with open(tmp_path / "b.mcap", "wb") as stream:
        writer = Writer(stream)
        writer.start("ros2", "test")
        schema = writer.register_schema("sensor_msgs/msg/Image", "ros2msg", b"")
        channel = writer.register_channel("/image", "cdr", schema)
        for i, picture in enumerate(PICTURES):
            image = Image(height=24, width=32, step=96, encoding="rgb8", data=picture.tobytes())
            writer.add_message(channel, i, serialize_message(image), i)
        writer.finish()
    found = read(open_source(camera(type="file", path="b.mcap", topic="/image"), tmp_path), 4)
    np.testing.assert_array_equal(found, PICTURES)


def test_end_of_a_file_that_does_not_loop_is_an_error(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), PICTURES[0])
    source = open_source(camera(type="file", path=str(tmp_path), loop=False))
    source.read()
    with pytest.raises(CameraError, match="found the end"):
        source.read()


def test_picture_of_another_size_is_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "0.png"), np.zeros((10, 20, 3), np.uint8))
    with pytest.raises(CameraError, match="expected 32x24 pixels, found 20x10"):
        open_source(camera(type="file", path=str(tmp_path))).read()


@pytest.mark.parametrize(
    ("driver", "named"),
    [
        ({"type": "mujoco"}, "driver.type: expected one of"),
        ({"type": "v4l2"}, "driver.device: missing"),
        ({"type": "v4l2", "device": "/dev/video77"}, "/dev/video77"),
        ({"type": "v4l2", "device": 0, "path": "x"}, "driver.path: unknown key"),
        ({"type": "v4l2", "device": 0, "latency": True}, "driver.latency: expected int or float"),
        ({"type": "file", "path": "absent.mp4"}, "absent.mp4"),
        ({"type": "realsense", "serial": 12}, "driver.serial: expected str"),
    ],
)
def test_driver_that_cannot_be_used_is_named(driver, named):
    with pytest.raises(CameraError, match=named):
        open_source(camera(**driver))


def test_realsense_without_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyrealsense2", None)
    with pytest.raises(CameraError, match="expected the package pyrealsense2"):
        open_source(camera(type="realsense"))


def test_realsense_frames_keep_the_time_of_the_host_clock(monkeypatch):
    """Against a library of the same interface that gives one frame, 50 ms old, and then vanishes."""
    import time

    class Frames:
        def get_color_frame(self):
            return self

        def get_frame_timestamp_domain(self):
            return "global"

        def get_timestamp(self):
            return (time.time() - 0.05) * 1e3

        def get_data(self):
            return PICTURES[1]

    frames = iter([Frames()])

    def wait_for_frames(_, timeout):
        try:
            return next(frames)
        except StopIteration:
            raise RuntimeError("device disconnected") from None

    library = types.ModuleType("pyrealsense2")
    nothing = lambda *_: None  # noqa: E731
    library.config = type("config", (), {"enable_device": nothing, "enable_stream": nothing})
    library.pipeline = type("pipeline", (), {"start": nothing, "stop": nothing, "wait_for_frames": wait_for_frames})
    library.stream = types.SimpleNamespace(color=1)
    library.format = types.SimpleNamespace(rgb8=2)
    library.timestamp_domain = types.SimpleNamespace(system_time="system", global_time="global")
    monkeypatch.setitem(sys.modules, "pyrealsense2", library)
    source = open_source(camera(type="realsense", serial="1"))
    frame = source.read()
    np.testing.assert_array_equal(frame.picture, PICTURES[1])
    assert 0.049 <= frame.age < 1.0
    with pytest.raises(CameraError, match="device disconnected"):
        source.read()


@pytest.mark.parametrize(("stamp", "age"), [(9_950.0, 0.05), (0.0, 0.0), (1.7e12, 0.0)])
def test_kernel_stamp_counts_when_it_is_on_the_monotonic_clock(stamp, age):
    assert kernel_age(stamp, 10.0) == pytest.approx(age)
