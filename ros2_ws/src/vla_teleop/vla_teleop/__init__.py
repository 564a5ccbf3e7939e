"""Teleoperation devices, episode recorder, bag tools."""
