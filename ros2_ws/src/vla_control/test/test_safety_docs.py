"""docs/safety.md says what the code does: states, watchdogs, codes and limits."""

import re
from pathlib import Path

from vla_control.safety import TRANSITIONS, SafetyLimits, State

ROOT = Path(__file__).resolve().parents[4]
PAGE = (ROOT / "docs" / "safety.md").read_text()
SOURCES = ROOT / "ros2_ws" / "src" / "vla_control" / "vla_control"


def test_the_diagram_is_the_code():
    drawn = re.findall(r"^\s+(\w+) --> (\w+): (.+)$", PAGE, re.MULTILINE)
    assert {(State[a], State[b]): text for a, b, text in drawn} == TRANSITIONS
    assert len(drawn) == len(TRANSITIONS)
    assert set(re.findall(r"^\| `([A-Z]+)` \|", PAGE, re.MULTILINE)) == set(State.__members__)


def test_every_watchdog_is_listed_with_its_default():
    defaults = vars(SafetyLimits())
    listed = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert {name: float(value) for name, value in listed} == {
        name: defaults[name] for name in defaults if re.search("_timeout$|^clock_jump$|^overrun$|_time$", name)
    }


def test_every_refusal_and_every_limit_is_listed():
    code = "".join((SOURCES / f"{name}.py").read_text() for name in ("safety", "command", "goal", "motion", "limits"))
    refusals = set(re.findall(r'CommandRefused\(\s*"(\w+)"', code)) - {"driver"}  # of arming
    assert refusals <= set(re.findall(r"`(\w+)`", PAGE.split("| code | refused |")[1].split("- Keeps")[0]))
    table = PAGE.split("| name | limit | from |")[1].split("The jerk")[0]
    limits = re.findall(r"^  \| `(\w+)` \|", table, re.MULTILINE)
    for name in limits:
        assert f'"{name}"' in code
