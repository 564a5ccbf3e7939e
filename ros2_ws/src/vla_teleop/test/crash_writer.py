"""Writes a bag as fast as 100 Hz and 30 Hz topics come, until killed: crash_writer.py FOLDER. No test by itself."""

import array
import sys
import time

from rclpy.serialization import serialize_message
from sensor_msgs.msg import Image, JointState
from vla_teleop.bag_writer import BagWriter

image = Image(height=240, width=320, encoding="rgb8", step=960, data=array.array("B", bytes(range(256)) * 900))
joints = serialize_message(JointState(name=["j1"], position=[0.0]))
pixels = serialize_message(image)
bag = BagWriter(sys.argv[1], facts={"task": "crash"})
print("ready", flush=True)
count = 0
while True:
    now = time.time_ns()
    bag.write_serialized("/joint_states", "sensor_msgs/msg/JointState", joints, now, sequence=count + 1)
    if count % 3 == 0:
        bag.write_serialized("/camera/scene/image_raw", "sensor_msgs/msg/Image", pixels, now)
    count += 1
    time.sleep(0.01)
