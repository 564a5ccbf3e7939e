# syntax=docker/dockerfile:1
# The robot image: real ROS 2 Jazzy, CUDA and TensorRT. Needs the NVIDIA container toolkit on the host.
#
#   docker compose -f docker/compose.yaml build robot
FROM ros:jazzy-ros-base

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# What the workspace takes from ROS itself instead of from wheels. Versions follow the ROS snapshot of the base image.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential \
        libegl1 \
        libgl1 \
        python3-colcon-common-extensions \
        python3-dev \
        python3-venv \
        ros-jazzy-cv-bridge \
        ros-jazzy-diagnostic-msgs \
        ros-jazzy-foxglove-bridge \
        ros-jazzy-realsense2-camera \
        ros-jazzy-rosbag2-storage-mcap \
        ros-jazzy-tf-transformations \
        ros-jazzy-tf2-msgs \
        ros-jazzy-v4l2-camera \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /vla
ENV PIP_CACHE_DIR=/var/cache/pip

# The environment before the sources, so that a change of code does not install it anew. On this platform pip's torch
# brings CUDA; onnxruntime-gpu takes the place of the CPU build, and TensorRT comes as wheels.
COPY vla ./
COPY ros2_ws/requirements.txt ros2_ws/requirements-gpu.txt ros2_ws/
# hadolint ignore=SC1091,DL3042
RUN --mount=type=cache,target=/var/cache/pip \
    source /opt/ros/jazzy/setup.bash \
    && ./vla environment \
    && .vla/venv/bin/python -m pip uninstall -y onnxruntime \
    && .vla/venv/bin/python -m pip install -r ros2_ws/requirements-gpu.txt

COPY . .
# hadolint ignore=SC1091
RUN source /opt/ros/jazzy/setup.bash && ./vla build

# The recorder writes to its user's ~/vla_bags.
RUN ln -s /bags ~/vla_bags
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics
COPY docker/entrypoint.sh /entrypoint.sh
ENTRYPOINT ["/entrypoint.sh"]
CMD ["./vla", "help"]
