from setuptools import find_packages, setup

package = 'vla_teleop'

setup(
    name=package,
    version='0.1.0',
    packages=find_packages(exclude=['test']),
    data_files=[
        ('share/ament_index/resource_index/packages', ['resource/' + package]),
        ('share/' + package, ['package.xml']),
    ],
    install_requires=['setuptools'],
    zip_safe=True,
    maintainer='The VLA stack developers',
    maintainer_email='dev@example.com',
    description='Teleoperation devices, episode recorder, bag tools',
    license='Apache-2.0',
    entry_points={
        'console_scripts': [
            'recorder_node = vla_teleop.recorder_node:main',
            'teleop_node = vla_teleop.teleop_node:main',
        ],
    },
)
