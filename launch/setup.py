from glob import glob

from setuptools import find_packages, setup

package = "vla_bringup"

setup(
    name=package,
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/" + package]),
        ("share/" + package, ["package.xml", "dds_profile.xml", *sorted(glob("*.launch.yaml"))]),
        ("share/" + package + "/robots", sorted(glob("robots/*.yaml"))),
        ("share/" + package + "/robots/models", sorted(glob("robots/models/*"))),
        ("share/" + package + "/policies", sorted(glob("policies/*.yaml"))),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="The VLA stack developers",
    maintainer_email="dev@example.com",
    description="Launch files, robot and policy descriptions, the demo and its report",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [],
    },
)
