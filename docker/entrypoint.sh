#!/usr/bin/env bash
# Sources ROS 2, then runs what it is given.
set -eo pipefail
# shellcheck disable=SC1091
source /opt/ros/jazzy/setup.bash
exec "$@"
