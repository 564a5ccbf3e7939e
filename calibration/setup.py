from glob import glob
from os.path import dirname

from setuptools import find_packages, setup

package = "vla_calibration"

setup(
    name=package,
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/" + package]),
        ("share/" + package, ["package.xml"]),
        *((f"share/{package}/{dirname(f)}", [f]) for f in sorted(glob("*/*.yaml"))),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="The VLA stack developers",
    maintainer_email="dev@example.com",
    description="Intrinsics and hand-eye calibration: files per robot and the code that reads them",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [],
    },
)
