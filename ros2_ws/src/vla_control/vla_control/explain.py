"""What the safety controller did in a recorded bag, when and why.

    python -m vla_control.explain BAG [plot:=FILE.png]

It reads /safety_events (each command limited, refused or stopped, each change of state), /safety_status, /command and
/joint_states. A bag without /safety_events is explained from /safety_status alone: then the code of a refusal and what
a limit changed are not known. No ROS is needed. docs/explain.md says how to read it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from vla_teleop import bags
from vla_teleop.bag_writer import BagError

STATUS, EVENTS, COMMAND, JOINTS = "/safety_status", "/safety_events", "/command", "/joint_states"
#: What happens again within this time is one span, s.
MERGE = 0.1
#: Times between joint states (or control periods) above this are gaps (overruns): so many times the usual one, and for
#: joint states at least so long, s.
LATE, GAP = 2.0, 0.05
_STATES = ("disarmed", "armed", "running", "holding", "stopping", "stopped", "fault")


@dataclass
class Span:
    """Something that went on from `start` to `end`, s since the bag's beginning.

    kind: state, stopped, refused, limited, gap or overrun. name: the state, the code or the limit. count: how often
    (periods, commands). before, after: of the strongest change, per joint. distance (m), nearest: smallest meanwhile.
    """

    start: float
    end: float
    kind: str
    arm: str
    name: str
    text: str = ""
    count: int = 1
    before: np.ndarray = field(default_factory=lambda: np.zeros(0))
    after: np.ndarray = field(default_factory=lambda: np.zeros(0))
    distance: float = math.inf
    nearest: str = ""


@dataclass(frozen=True)
class Explanation:
    """A bag explained. Arrays have one value for each status message, (m,).

    spans: in order of their start. begin: ROS time that times count from, s. duration: s. counts: messages a topic;
    sources: commands of each sender. speed: arm -> speed of the commanded tool, m/s. distance: to the nearest of the
    watched pairs, m, infinity when none is near. states: state names.
    """

    spans: list[Span]
    begin: float
    duration: float
    counts: dict[str, int]
    sources: dict[str, int]
    time: np.ndarray
    states: list[str]
    speed: dict[str, np.ndarray]
    distance: np.ndarray

    def shares(self) -> dict[str, float]:
        """State -> how long it lasted, s."""
        total: dict[str, float] = {}
        for state, length in zip(self.states, np.diff(self.time, append=self.time[-1:]), strict=True):
            total[state] = total.get(state, 0.0) + float(length)
        return total


def explain(folder: str | Path) -> Explanation:
    """Read a bag and find out what the controller did.

    Raises:
        BagError: no finished bag, one without /safety_status, or one that is broken.
    """
    counts = {topic: bags.info(folder).received.get(topic, 0) for topic in (STATUS, EVENTS, COMMAND, JOINTS)}
    if not counts[STATUS]:
        found = sorted(topic for topic, count in bags.info(folder).received.items() if count)
        raise BagError(f"bag {folder}: expected messages of {STATUS}, found {', '.join(found) or 'no messages'}")
    read: dict[str, list[tuple[float, Any]]] = {topic: [] for topic in counts}
    for topic, time, message in bags.messages(folder, counts):
        read[topic].append((time, message))
    begin = min(messages[0][0] for messages in read.values() if messages)
    end = max(messages[-1][0] for messages in read.values() if messages)
    read = {topic: [(time - begin, message) for time, message in messages] for topic, messages in read.items()}
    statuses = read[STATUS]
    told = bool(read[EVENTS])
    spans = [*_states(statuses, read[EVENTS] if told else None)]
    spans += _from_events(read[EVENTS], statuses) if told else _from_status(statuses)
    spans += _late([t for t, _ in read[JOINTS]], "gap", "joint states", GAP)
    spans += _overruns(statuses)
    _add_distances(spans, statuses)
    time = np.array([t for t, _ in statuses])
    return Explanation(
        spans=sorted(spans, key=lambda s: (s.start, s.kind != "stopped")),
        begin=begin,
        duration=end - begin,
        counts=counts,
        sources=dict(Counter(message.source for _, message in read[COMMAND])),
        time=time,
        states=[_state(message) for _, message in statuses],
        speed=_speeds(time, [message for _, message in statuses]),
        distance=np.array([getattr(message, "distance", math.inf) for _, message in statuses]),
    )


# ------------------------------------------------------------------------------------------------------- findings


def _state(status: Any) -> str:
    """Name of a status' state, by the constants of the definition that the bag was recorded with."""
    for name in _STATES:
        if getattr(type(status), name.upper(), None) == status.state:
            return name
    return f"state {status.state}"


def _states(statuses: list, events: list | None) -> Iterable[Span]:
    """The first state, and each change; from the events where there are any, since they tell of every one."""
    time, first = statuses[0]
    yield Span(time, time, "state", "", _state(first), first.reason)
    if events is not None:
        for time, event in events:
            if event.kind == "state":
                yield Span(time, time, "state", event.arm, event.reasons[0] if event.reasons else "", event.text)
        return
    before = first
    for time, status in statuses[1:]:
        if status.state != before.state:
            yield Span(time, time, "state", "", _state(status), status.reason)
        before = status


def _from_events(events: list, statuses: list) -> list[Span]:
    """Stops, refusals and limits, told by the controller itself."""
    times = np.array([t for t, _ in statuses])
    merged = _Merged()
    for time, event in events:
        before, after = np.asarray(event.before, float), np.asarray(event.after, float)
        if event.kind == "stopped":
            # The status of that period says the category; a stop told between two is in the second one.
            k = min(int(np.searchsorted(times, time - 1e-6)), len(times) - 1)
            category = getattr(statuses[k][1], "stop_category", -1)
            for name in event.reasons:
                text = f"{_stop_words(category)}: {event.text}"
                merged.spans.append(Span(time, time, "stopped", event.arm, name, text, 1, before, after))
        elif event.kind in ("limited", "refused"):
            for name in event.reasons:
                text = event.text if event.kind == "refused" else ""
                merged.add(Span(time, time, event.kind, event.arm, name, text, 1, before, after))
    return merged.spans


def _from_status(statuses: list) -> list[Span]:
    """Stops, refusals and limits as far as the status shows them."""
    merged = _Merged()
    before = statuses[0][1]
    for time, status in statuses:
        if status is not before:
            stop = _state(status) in ("stopping", "stopped", "fault") and status.state != before.state
            if stop and _state(before) != "stopping":
                category = getattr(status, "stop_category", None)
                words = "" if category is None else f"{_stop_words(category)}: "
                merged.spans.append(Span(time, time, "stopped", "", "unknown", words + status.reason))
            refused = int(status.refused) - int(before.refused)
            if refused > 0:
                merged.add(Span(time, time, "refused", "", "unknown", f"recorded without {EVENTS}", refused))
        for part in status.arms:
            for name in part.limited:
                merged.add(Span(time, time, "limited", part.arm, name))
        before = status
    return merged.spans


def _stop_words(category: int) -> str:
    return f"category {category}" if category >= 0 else "brake and hold"


class _Merged:
    """Spans of things that go on, of which each message tells once."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._open: dict[tuple[str, str, str], Span] = {}

    def add(self, span: Span) -> None:
        key = span.kind, span.arm, span.name
        known = self._open.get(key)
        if known is None or span.start - known.end > MERGE:
            self._open[key] = span
            self.spans.append(span)
            return
        known.end = span.end
        known.count += span.count
        if _change(span) > _change(known):
            known.before, known.after = span.before, span.after


def _change(span: Span) -> float:
    """The largest change of any joint; none where the numbers before and after do not belong together."""
    if span.before.shape != span.after.shape or not span.before.size:
        return -1.0
    return float(np.abs(span.before - span.after).max())


def _late(times: Sequence[float], kind: str, name: str, least: float) -> list[Span]:
    """Gaps between times that are otherwise regular."""
    apart = np.diff(times)
    if not len(apart):
        return []
    most = max(LATE * float(np.median(apart)), least)
    return [
        Span(times[k], times[k + 1], kind, "", name, f"none for {apart[k]:.3f} s") for k in np.flatnonzero(apart > most)
    ]


def _overruns(statuses: list) -> list[Span]:
    """Control periods that came late, by the controller's own clock."""
    periods = np.array([message.period for _, message in statuses], float)
    sound = periods[np.isfinite(periods) & (periods > 0)]
    if not len(sound):
        return []
    usual = float(np.median(sound))
    return [
        Span(
            max(statuses[k][0] - periods[k], 0.0),
            statuses[k][0],
            "overrun",
            "",
            "control period",
            f"{1e3 * periods[k]:.1f} ms instead of {1e3 * usual:.1f} ms",
        )
        for k in np.flatnonzero(periods > LATE * usual)
    ]


def _add_distances(spans: list[Span], statuses: list) -> None:
    """The smallest distance and its pair, to each span of a limit."""
    if not hasattr(statuses[0][1], "distance"):
        return
    times = np.array([t for t, _ in statuses])
    distances = np.array([message.distance for _, message in statuses])
    for span in spans:
        if span.kind == "limited":
            first, last = np.searchsorted(times, [span.start - 1e-6, span.end + 1e-6])
            if first < last:
                k = first + int(np.argmin(distances[first:last]))
                span.distance, span.nearest = float(distances[k]), statuses[k][1].nearest


def _speeds(time: np.ndarray, statuses: list) -> dict[str, np.ndarray]:
    """Arm -> speed of the commanded tool, (m,) m/s."""
    speeds = {}
    for k, part in enumerate(statuses[0].arms):
        points = [message.arms[k].commanded.position for message in statuses]
        moved = np.linalg.norm(np.diff([[p.x, p.y, p.z] for p in points], axis=0, prepend=np.nan), axis=1)
        elapsed = np.diff(time, prepend=np.nan)
        speeds[part.arm] = np.divide(moved, elapsed, out=np.full(len(time), np.nan), where=elapsed > 0)
    return speeds


# ------------------------------------------------------------------------------------------------------- printing


def report(name: str, found: Explanation) -> str:
    """The timeline and the counts, as text."""
    start = datetime.fromtimestamp(found.begin, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    sources = ", ".join(f"{source or 'unnamed'} {count}" for source, count in found.sources.items())
    counts = [
        f"{topic} {count}" + (f" ({sources})" if topic == COMMAND and sources else "")
        for topic, count in found.counts.items()
    ]
    lines = [f"bag {name}: {found.duration:.2f} s from {start} ({found.begin:.3f})", ", ".join(counts)]
    if not found.counts[EVENTS]:
        lines.append(f"no {EVENTS}: from {STATUS} alone, without codes of refusals and without what limits changed")
    lines += ["", f"{'from s':>9} {'to s':>9}  {'arm':<8} {'what':<8} {'':<14}  details"]
    for span in found.spans:
        to = f"{span.end:9.3f}" if span.end > span.start else " " * 9
        line = f"{span.start:9.3f} {to}  {span.arm or '-':<8} {span.kind:<8} {span.name:<14}  {_details(span)}"
        lines.append(line.rstrip())
    lines += ["", *_totals(found)]
    return "\n".join(lines)


def _details(span: Span) -> str:
    words = []
    if span.kind == "limited":
        words.append(f"{span.count} period{'s' * (span.count > 1)}")
        if _change(span) >= 0:
            k = int(np.argmax(np.abs(span.before - span.after)))
            words.append(f"joint {k + 1}: {span.before[k]:+.3f} -> {span.after[k]:+.3f} rad/s")
        if math.isfinite(span.distance):
            words.append(f"nearest {1e3 * span.distance:.0f} mm: {span.nearest}")
    elif span.kind == "stopped":
        words.append(span.text)
        if span.before.size:
            words.append(f"fastest joint {np.abs(span.before).max():.3f} rad/s")
    elif span.kind == "refused":
        words += [f"{span.count} command{'s' * (span.count > 1)}", span.text]
    else:
        words.append(span.text)
    return "; ".join(word for word in words if word)


def _totals(found: Explanation) -> list[str]:
    lines = ["in state: " + ", ".join(f"{state} {length:.2f} s" for state, length in found.shares().items())]
    for kind, unit in (("limited", "periods"), ("refused", "commands"), ("stopped", "times")):
        total: Counter[str] = Counter()
        for span in found.spans:
            if span.kind == kind:
                total[" ".join(filter(None, (span.arm, span.name)))] += span.count
        words = ", ".join(f"{name} {count}" for name, count in total.most_common())
        lines.append(f"{kind} ({unit}): {words or 'none'}")
    for kind, words in (("gap", "gaps of joint states"), ("overrun", "control periods too long")):
        lengths = [span.end - span.start for span in found.spans if span.kind == kind]
        lines.append(f"{words}: " + (f"{len(lengths)}, longest {max(lengths):.3f} s" if lengths else "none"))
    near = found.distance[np.isfinite(found.distance)]
    lines.append("smallest distance of watched links: " + (f"{1e3 * near.min():.0f} mm" if len(near) else "none near"))
    return lines


# -------------------------------------------------------------------------------------------------------- drawing

_COLOURS = {
    "disarmed": "#d0d0d0",
    "armed": "#bfd7ff",
    "running": "#bfe6bf",
    "holding": "#ffe9a8",
    "stopping": "#ffc08a",
    "stopped": "#f2a0a0",
    "fault": "#c79ad6",
}


def plot(name: str, found: Explanation, path: Path) -> None:
    """Draw speed of the tools, distance, and all that was limited, refused and stopped, over the states' colours."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = list(dict.fromkeys((s.kind, s.arm, s.name) for s in found.spans if s.kind != "state"))
    order = ("limited", "refused", "stopped", "gap", "overrun")
    rows.sort(key=lambda row: order.index(row[0]))
    figure = Figure(figsize=(11, 4.6 + 0.24 * len(rows)), layout="constrained")
    heights = [1.3, 0.9, max(0.12 * len(rows), 0.3)]
    top, middle, bottom = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": heights})
    edges = np.flatnonzero([a != b for a, b in zip(found.states[:-1], found.states[1:], strict=True)]) + 1
    bounds = [0, *edges, len(found.states) - 1]
    for first, last in zip(bounds[:-1], bounds[1:], strict=True):
        for axes in (top, middle, bottom):
            colour = _COLOURS.get(found.states[first], "white")
            axes.axvspan(found.time[first], found.time[last], color=colour, linewidth=0, zorder=0)
    for arm, speed in found.speed.items():
        top.plot(found.time, speed, label=f"tool of {arm}", linewidth=1.2)
    marks = {"refused": ("x", "tab:red"), "stopped": ("v", "black")}
    for kind, (marker, colour) in marks.items():
        times = [s.start for s in found.spans if s.kind == kind]
        if times:
            top.plot(times, np.zeros(len(times)), marker, color=colour, label=kind, clip_on=False, zorder=3)
    top.set_ylabel("tool speed, m/s")
    top.set_ylim(bottom=0)
    states = [Patch(color=_COLOURS.get(s, "white"), label=s) for s in dict.fromkeys(found.states)]
    figure.legend(
        handles=[*top.get_legend_handles_labels()[0], *states], loc="outside upper center", ncols=6, title=name
    )
    finite = np.where(np.isfinite(found.distance), found.distance, np.nan)
    middle.plot(found.time, 1e3 * finite, color="tab:purple", linewidth=1.2)
    if np.isnan(finite).all():
        middle.text(0.5, 0.5, "no watched pair is near", transform=middle.transAxes, ha="center", va="center")
        middle.set_yticks([])
    else:
        middle.set_ylim(bottom=min(0.0, 1e3 * float(np.nanmin(finite))))
    middle.set_ylabel("nearest pair, mm")
    shortest = max(found.duration, 1e-3) / 400  # so that a single period can be seen
    for k, row in enumerate(rows):
        bars = [(s.start, max(s.end - s.start, shortest)) for s in found.spans if (s.kind, s.arm, s.name) == row]
        colour = {"limited": "tab:blue", "refused": "tab:red", "stopped": "black"}.get(row[0], "tab:brown")
        bottom.broken_barh(bars, (k - 0.35, 0.7), color=colour, zorder=2)
    bottom.set_yticks(range(len(rows)), [" ".join(filter(None, row)) for row in rows], fontsize=8)
    bottom.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    bottom.set_xlabel("time, s")
    bottom.set_xlim(0, max(found.duration, 1e-3))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="vla_control.explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bag", type=Path, help="folder of a finished bag")
    parser.add_argument("--plot", type=Path, default=None, help="PNG file to draw (plot:=FILE.png does the same)")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(
        ["--plot=" + a.removeprefix("plot:=") if a.startswith("plot:=") else a for a in arguments]
    )
    try:
        found = explain(given.bag)
    except BagError as error:
        print(error, file=sys.stderr)
        return 1
    print(report(given.bag.name, found))
    if given.plot:
        plot(given.bag.name, found, given.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
