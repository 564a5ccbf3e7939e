"""What the executor measures of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Metrics:
    """Counts and series since the last reset; series are bounded by `NEWEST`."""

    NEWEST = 10_000

    chunks: int = 0  # chunks put in force
    refused: int = 0  # chunks refused
    requests: int = 0  # requests sent, again-sent ones included
    empty_ticks: int = 0  # control periods without a plan after the first chunk
    limited_ticks: int = 0  # control periods in which the tool speed limit cut the step
    boundary_translation: list[float] = field(default_factory=list)  # at each switch of chunks, m
    boundary_rotation: list[float] = field(default_factory=list)  # the same, rad
    command_age: list[float] = field(default_factory=list)  # command minus its observation, s
    delay: list[float] = field(default_factory=list)  # observation to arrival of each chunk, s

    def append(self, name: str, value: float) -> None:
        """Add to a series, dropping its oldest value when it is full."""
        series = getattr(self, name)
        series.append(float(value))
        if len(series) > self.NEWEST:
            del series[0]

    def summary(self) -> dict[str, float | int]:
        """Numbers for a table or for diagnostics; keys carry the unit, NaN where nothing was measured."""
        out: dict[str, float | int] = {
            "chunks": self.chunks,
            "refused": self.refused,
            "requests": self.requests,
            "empty_ticks": self.empty_ticks,
            "limited_ticks": self.limited_ticks,
        }
        for name, values, scale in (
            ("boundary_step_mm", self.boundary_translation, 1e3),
            ("boundary_step_deg", self.boundary_rotation, 180 / np.pi),
            ("command_age_ms", self.command_age, 1e3),
            ("delay_ms", self.delay, 1e3),
        ):
            array = np.array(values) * scale
            for what, number in (("median", np.median), ("max", np.max)):
                out[f"{name}_{what}"] = float(number(array)) if len(array) else float("nan")
        return out
