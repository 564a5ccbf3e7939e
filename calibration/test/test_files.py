"""Calibration files: what is written comes back, what is wrong is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vla_calibration.files import CalibrationError, CameraCalibration, load_camera, save_camera
from vla_core import se3

VALID = {
    "camera": "scene",
    "width": 320,
    "height": 240,
    "K": [[300.0, 0, 159.5], [0, 300.0, 119.5], [0, 0, 1]],
    "distortion": [0.1, -0.2, 1e-7, 0.0, 0.03],
    "parent": "world",
    "T_parent_camera": np.eye(4),
}


VECTOR = st.lists(st.floats(-3, 3), min_size=3, max_size=3).map(np.array)


@given(w=VECTOR, p=VECTOR)
@settings(max_examples=30, deadline=None)
def test_numbers_come_back_bit_for_bit(tmp_path_factory, w, p):
    path = tmp_path_factory.mktemp("robot") / "new" / "scene.yaml"
    saved = CameraCalibration(**VALID | {"T_parent_camera": se3.transform(se3.exp_so3(w), p)})
    save_camera(path, saved)
    loaded = load_camera(path)
    for key in VALID:
        assert np.array_equal(getattr(loaded, key), getattr(saved, key))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"K": np.eye(4)}, "k: expected numbers of shape"),
        ({"K": [[300, 0, 500], [0, 300, 119], [0, 0, 1]]}, "principal point"),
        ({"K": [[300, 1, 160], [0, 300, 119], [0, 0, 1]]}, "fx, 0, cx"),
        ({"K": [[-300, 0, 160], [0, 300, 119], [0, 0, 1]]}, "focal"),
        ({"width": 320.0}, "width"),
        ({"height": 0}, "height"),
        ({"distortion": [0, 0]}, "distortion"),
        ({"parent": ""}, "parent"),
        ({"T_parent_camera": np.diag([1, 1, 1.01, 1])}, "orthonormal"),
        ({"T_parent_camera": np.diag([1, 1, -1, 1])}, "right-handed"),
        ({"T_parent_camera": np.full((4, 4), np.nan)}, "finite"),
        ({"T_parent_camera": np.diag([1, 1, 1, 2])}, "last row"),
    ],
)
def test_wrong_numbers_are_refused_by_name(change, named):
    with pytest.raises(CalibrationError, match=named):
        CameraCalibration(**VALID | change)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda text: text + "extra: 1\n", "extra: unknown key"),
        (lambda text: text.replace("parent: world\n", ""), "parent: missing"),
        (lambda text: "[", "not valid YAML"),
        (lambda text: "", "expected a mapping"),
    ],
)
def test_wrong_file_is_refused_with_its_path(tmp_path, edit, named):
    path = tmp_path / "scene.yaml"
    save_camera(path, CameraCalibration(**VALID))
    path.write_text(edit(path.read_text()))
    with pytest.raises(CalibrationError, match=named) as error:
        load_camera(path)
    assert str(path) in str(error.value)


def test_absent_file_is_refused_with_its_path(tmp_path):
    with pytest.raises(CalibrationError, match="absent.yaml"):
        load_camera(tmp_path / "absent.yaml")
