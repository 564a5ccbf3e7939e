"""Intrinsics and extrinsics of cameras: one file per robot and camera, and the code that reads and writes it."""
