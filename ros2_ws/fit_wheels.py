"""Make the ROS 2 wheels in this environment usable for building interface packages.

The CMake files that the wheels export carry two paths of the machine they were built on, Python's and NumPy's
include folders; they are replaced by the ones of this environment. Running it twice changes nothing.
"""

import re
import sys
import sysconfig
from pathlib import Path

import numpy

REPLACEMENTS = (
    (re.compile(r'/opt/python/[^;"\s]*?/site-packages/numpy/_core/include'), numpy.get_include()),
    (re.compile(r'/opt/python/[^;"\s]*?/include/python3\.\d+'), sysconfig.get_path("include")),
)


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


if __name__ == "__main__":
    main()
