from setuptools import find_packages, setup

package = "vla_control"

setup(
    name=package,
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/" + package]),
        ("share/" + package, ["package.xml"]),
    ],
    install_requires=["setuptools"],
    # One for each driver of vla_control.drivers that needs a library; versions are in ros2_ws/requirements*.txt.
    extras_require={
        "dynamixel": ["dynamixel-sdk"],
        "feetech": ["feetech-servo-sdk"],
        "franka": ["franky-control"],
        "piper": ["python-can"],
        "xarm": ["xarm-python-sdk"],
    },
    zip_safe=True,
    maintainer="The VLA stack developers",
    maintainer_email="dev@example.com",
    description="The safety controller and the arm drivers",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "driver_node = vla_control.driver_node:main",
            "safety_controller_node = vla_control.safety_controller_node:main",
            "stop = vla_control.stop:main",
        ],
    },
)
