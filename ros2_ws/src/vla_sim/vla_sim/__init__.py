"""MuJoCo robots that look like real ones from ROS."""
