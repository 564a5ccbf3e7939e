"""What is changed in the ROS 2 wheels: a participant that ends does not wait without end."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "ros2_ws"))
from fit_wheels import ENDLESS, LONGEST, with_an_end  # noqa: E402

ENDLESS_TIME = b"\xff" * 7 + b"\x7f"
#: set_listener(listener) and set_listener(listener, mask) as the wheels have them.
FUNCTIONS = (
    b"\x48\xba" + ENDLESS_TIME + b"\xe9\x71\xde\xec\xff\x90\x48\xb9" + ENDLESS_TIME + b"\xe9\x11\xe6\xec\xff\x90"
)


def test_the_wait_gets_an_end_and_nothing_else_changes():
    library = b"before" + FUNCTIONS + b"after"
    fitted = with_an_end(library)
    at = len(b"before") + 2
    assert int.from_bytes(fitted[at : at + 8], "little") == LONGEST
    assert fitted[:at] == library[:at] and fitted[at + 8 :] == library[at + 8 :]
    assert with_an_end(fitted) == fitted


@pytest.mark.parametrize("library", [b"", b"another build", 2 * FUNCTIONS])
def test_a_library_that_looks_otherwise_stays_as_it_is(library):
    assert with_an_end(library) == library


def test_fast_dds_of_this_environment_waits_no_longer():
    """As loaded by a node; a sourced ROS 2 is built with a C++ library in which that time does not overflow."""
    found = list(Path(sys.prefix).glob("lib/libfastdds.so*"))
    if not found:
        pytest.skip("ROS 2 is not from the wheels here")
    for path in found:
        assert not ENDLESS.search(path.read_bytes()), f"{path.name}: run ros2_ws/fit_wheels.py"
