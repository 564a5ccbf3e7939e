from setuptools import find_packages, setup

package = "vla_perception"

setup(
    name=package,
    version="0.1.0",
    packages=find_packages(exclude=["test"]),
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/" + package]),
        ("share/" + package, ["package.xml"]),
    ],
    install_requires=["setuptools"],
    zip_safe=True,
    maintainer="The VLA stack developers",
    maintainer_email="dev@example.com",
    description="Cameras, synchronised observations, calibration on TF, transform buffer",
    license="Apache-2.0",
    entry_points={
        "console_scripts": [
            "camera_node = vla_perception.camera_node:main",
            "observation_node = vla_perception.observation_node:main",
            "calibration_tf_node = vla_perception.calibration_tf_node:main",
        ],
    },
)
