"""Intrinsics and hand-eye calibration: files per robot and the code that reads them."""
