"""Camera intrinsics and extrinsics: one file per robot and camera, and what reads and writes it."""
