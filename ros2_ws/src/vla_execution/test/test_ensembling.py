import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from vla_core import se3
from vla_execution.ensembling import EnsembleError, TemporalEnsembler, ensemble_weights
from vla_execution.layout import Layout

POSE = Layout("pose", ("arm",), (8,))


def test_vector_of_three_steps():
    ensembler, found = TemporalEnsembler(decay=0.1), []
    for step, chunk in enumerate(([10, 11, 12], [20, 21, 22], [30, 31, 32], [40, 41, 42])):
        ensembler.add(step, chunk)
        found.append(float(ensembler.action(step)))
    np.testing.assert_allclose(found, [10, 15.275187, 20.400998, 30.400998], atol=1e-6)


def test_vector_of_four_predictions_oldest_first():
    ensembler = TemporalEnsembler(0.01)
    for step, value in enumerate((1, 2, 3, 4)):
        ensembler.add(step, [value] * (4 - step))
    assert float(ensembler.action(3)) == pytest.approx(2.487500, abs=1e-6)


@given(arrays(float, (6, 4, 2), elements=st.floats(-10, 10)), st.floats(-1, 1))
def test_online_form_equals_batch_form(chunks, decay):
    """avg *= C[n-1]; avg += new w[n]; avg /= C[n] with C = cumsum(w), as ACT's users write it."""
    w = np.exp(-decay * np.arange(4))
    C = np.cumsum(w)
    ensembler, average, count = TemporalEnsembler(decay), np.zeros((0, 2)), np.zeros(0, int)
    for step, chunk in enumerate(chunks):
        for i in range(len(average)):
            average[i] = (average[i] * C[count[i] - 1] + chunk[i] * w[count[i]]) / C[count[i]]
        count = np.append(count + 1, np.ones(4 - len(average), int))
        average = np.concatenate([average, chunk[len(average) :]])
        ensembler.add(step, chunk)
        np.testing.assert_allclose(ensembler.action(step), average[0], atol=1e-9)
        average, count = average[1:], count[1:]


def test_a_positive_decay_favours_the_oldest():
    assert np.all(np.diff(ensemble_weights(5, 0.1)) < 0)
    assert np.all(np.diff(ensemble_weights(5, -0.1)) > 0)


def test_rotations_are_averaged_on_the_sphere_and_grippers_by_decision():
    ensembler = TemporalEnsembler(0.0, POSE)
    for step, (angle, opening) in enumerate(((0.2, 1.0), (0.6, 0.0), (1.0, 0.0))):
        q = se3.matrix_to_quat(se3.exp_so3([0, 0, angle]))
        chunk = np.tile([0.1 * step, 0, 0, *q, opening], (3, 1))
        chunk[:, 3:7] *= (-1) ** step  # the sign of a quaternion means nothing
        ensembler.add(step, chunk)
    action = ensembler.action(2)
    np.testing.assert_allclose(action[:3], [0.1, 0, 0], atol=1e-12)
    np.testing.assert_allclose(se3.log_so3(se3.quat_to_matrix(action[3:7])), [0, 0, 0.6], atol=1e-9)
    assert action[7] == 0.0


@pytest.mark.parametrize("chunk", [[], 1.0, [np.nan, 1.0]])
def test_a_chunk_without_finite_actions_is_refused(chunk):
    with pytest.raises(EnsembleError, match="expected finite"):
        TemporalEnsembler().add(0, chunk)


def test_a_step_nobody_predicted_is_an_error():
    ensembler = TemporalEnsembler()
    ensembler.add(0, [1.0, 2.0])
    with pytest.raises(EnsembleError, match="step 2"):
        ensembler.action(2)
