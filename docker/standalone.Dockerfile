# syntax=docker/dockerfile:1
# The standalone image: no ROS 2 distribution; `./vla` brings ROS 2 from wheels. For simulation, training and CI.
#
#   docker compose -f docker/compose.yaml build standalone
FROM python:3.12-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends \
        build-essential cmake libegl1 libgl1 libosmesa6 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /vla
ENV PIP_CACHE_DIR=/var/cache/pip
# The environment before the sources, so that a change of code does not install it anew.
COPY vla ./
COPY ros2_ws/requirements.txt ros2_ws/requirements-ros.txt ros2_ws/fit_wheels.py ros2_ws/
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/var/cache/pip ./vla environment

COPY . .
RUN ./vla build

ENTRYPOINT ["./vla"]
CMD ["demo"]
