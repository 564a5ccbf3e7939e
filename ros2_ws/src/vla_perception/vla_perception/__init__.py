"""Cameras, synchronised observations, calibration on TF, transform buffer."""
