"""Experiments of `results/` whose numbers are known: the published table, closed forms and densities."""

from types import SimpleNamespace

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments import closed_form, distributions, estimators

from amortax.common import lqr

PUBLISHED = {  # mean, bias, variance, mean squared error
    "naive": (1.999266, -2.000734, 0.005756, 4.008693),
    "score_function": (3.995299, -0.004701, 0.058130, 0.058152),
    "reparameterized": (3.999579, -0.000421, 0.017229, 0.017230),
}


def test_estimators_give_the_published_table_and_leave_the_generator_as_it_was():
    before = jax.config.jax_threefry_partitionable
    rows = [row | {"x": float(row["x"])} for row in estimators.measure((1000, 1000))]
    assert jax.config.jax_threefry_partitionable == before
    for name, expected in PUBLISHED.items():
        found = [estimators.statistic(rows, name, what)[1, 0] for what in estimators.STATISTICS]
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("env", ["LQR1-v0", "LQR-v0"])
def test_the_best_gain_is_as_good_as_the_closed_form(env):
    K = jnp.asarray(lqr.solve(gymnax.make(env)[1], closed_form.GAMMA).K)
    module, config = SimpleNamespace(act=lambda config, gain, s: -gain @ s), SimpleNamespace(env=env)
    evaluated = lambda config, params, K: closed_form.evaluate(module, config, params, K)
    np.testing.assert_allclose(closed_form.compare(evaluated, config, K, 0.0)[:2], (1, 0), atol=1e-6)
    cost_ratio, error, variance_ratio = closed_form.compare(evaluated, config, 0.5 * K, 0.0)
    assert cost_ratio > 1.01
    assert error == pytest.approx(0.5)
    assert variance_ratio == ""


@pytest.mark.parametrize("label", list(distributions.PANELS)[:6])
def test_bins_hold_the_whole_density_and_its_samples(label):
    rows = distributions.measure_panel((distributions.PANELS[label], 20_000))
    x, samples, density = (np.array([float(row[name]) for row in rows]) for name in ("x", "samples", "density"))
    width = np.diff(np.unique(x)).mean() ** (2 if label.startswith(distributions.PLANE) else 1)
    assert samples.sum() * width == pytest.approx(1, abs=0.002)
    assert density.sum() * width == pytest.approx(1, abs=0.002)
    assert np.abs(samples - density).sum() * width < 0.1
