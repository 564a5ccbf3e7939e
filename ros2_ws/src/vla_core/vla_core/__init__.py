"""SE(3), robot description, action spaces, timelines: no ROS, no torch."""
