"""Normalisers: statistics, inverse, JSON, refusals."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vla_models.normalization import KINDS, NormalizationError, Normalizer


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 1000), scale=st.floats(0.1, 100))
def test_denormalize_undoes_normalize(kind, seed, scale):
    samples = scale * np.random.default_rng(seed).normal(size=(50, 4, 3))
    normalizer = Normalizer.fit(kind, samples)
    np.testing.assert_allclose(normalizer.denormalize(normalizer.normalize(samples)), samples, atol=1e-5 * scale)


def test_mean_std_gives_zero_mean_and_unit_deviation():
    values = Normalizer.fit("mean_std", np.random.default_rng(0).normal(3, 2, (4000, 2))).normalize
    out = values(np.random.default_rng(0).normal(3, 2, (4000, 2)))
    np.testing.assert_allclose([out.mean(), out.std()], [0, 1], atol=1e-3)


def test_min_max_and_quantiles_map_to_the_unit_interval():
    samples = np.linspace(-4, 8, 1001)[:, None]
    assert np.abs(Normalizer.fit("min_max", samples).normalize(samples)).max() == pytest.approx(1)
    quantile = Normalizer.fit("quantile", samples)
    edges = quantile.normalize(np.quantile(samples, [0.01, 0.99])[:, None])[:, 0]
    np.testing.assert_allclose(edges, [-1, 1], atol=1e-6)


def test_what_hardly_moves_is_not_blown_up():
    assert Normalizer.fit("mean_std", np.full((10, 2), 0.3)).scale.tolist() == [0.01, 0.01]


def test_json_round_trip():
    normalizer = Normalizer.fit("quantile", np.random.default_rng(1).normal(size=(30, 5)))
    again = Normalizer.from_dict(json.loads(json.dumps(normalizer.to_dict())))
    assert again.kind == "quantile" and np.array_equal(again.scale, normalizer.scale)


@pytest.mark.parametrize(
    "values",
    [{}, [], {"kind": "other", "offset": [0], "scale": [1]}, {"kind": "mean_std", "offset": [0], "scale": [0]},
     {"kind": "mean_std", "offset": [0, 1], "scale": [1]}, {"kind": "mean_std", "offset": ["x"], "scale": [1]}],
)  # fmt: skip
def test_bad_statistics_are_refused(values):
    with pytest.raises(NormalizationError, match="normaliser"):
        Normalizer.from_dict(values)
