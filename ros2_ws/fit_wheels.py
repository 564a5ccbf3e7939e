"""Make the ROS 2 wheels in this environment fit this machine. Running it twice changes nothing.

The CMake files that the wheels export carry two paths of the machine they were built on, Python's and NumPy's
include folders; they are replaced by the ones of this environment.

Fast DDS of the wheels hangs now and then as a node ends: `DomainParticipant::set_listener(listener)` waits without end
for callbacks that run, and this endless time overflows in the C++ library that the wheels were built with, so that it
spins and holds the lock that the callback needs (github.com/eProsima/Fast-DDS/issues/6513; one in some 250 nodes that
end together). There it waits for a minute at most now, which does not overflow; a callback takes milliseconds.
"""

import re
import struct
import sys
import sysconfig
from pathlib import Path

import numpy

REPLACEMENTS = (
    (re.compile(r'/opt/python/[^;"\s]*?/site-packages/numpy/_core/include'), numpy.get_include()),
    (re.compile(r'/opt/python/[^;"\s]*?/include/python3\.\d+'), sysconfig.get_path("include")),
)
#: How long a participant that ends waits for callbacks, s.
LONGEST = 60
#: The two functions that add a time without end, one after the other: `mov rdx, time; jmp`, padded to 16 bytes, and
#: the same with rcx.
_FOREVER = struct.pack("<q", 2**63 - 1)
ENDLESS = re.compile(rb"\x48\xba" + _FOREVER + rb"(?=\xe9.{4}\x90\x48\xb9" + _FOREVER + rb"\xe9.{4}\x90)", re.DOTALL)


def with_an_end(library: bytes) -> bytes:
    """Fast DDS with a finite wait; the same bytes where there is not just one place that looks like it."""
    if len(ENDLESS.findall(library)) != 1:
        return library
    return ENDLESS.sub(lambda _: b"\x48\xba" + struct.pack("<q", LONGEST), library)


def main() -> None:
    changed = 0
    for path in Path(sys.prefix).glob("share/*/cmake/*.cmake"):
        text = fitted = path.read_text()
        for pattern, value in REPLACEMENTS:
            fitted = pattern.sub(lambda _, value=value: value, fitted)
        if fitted != text:
            path.write_text(fitted)
            changed += 1
    print(f"{changed} CMake files changed")
    for path in Path(sys.prefix).glob("lib/libfastdds.so*"):
        library = path.read_bytes()
        fitted = with_an_end(library)
        if not path.is_symlink() and fitted != library:
            # Under another name first: who has the library open keeps what it has.
            copy = path.with_name(f"fitted-{path.name}")
            copy.write_bytes(fitted)
            copy.chmod(path.stat().st_mode)
            copy.replace(path)
            print(f"{path.name}: ends of participants wait {LONGEST} s at most")


if __name__ == "__main__":
    main()
