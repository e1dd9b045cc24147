"""Distributions against SciPy, TFP and finite differences; estimators against closed forms and the published table."""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from jax import random
from tensorflow_probability.substrates import jax as tfp

from amortax.algorithms import gradient_estimators as ge
from amortax.common import demo

N = 20_000
COVARIANCE = np.array([[2.0, 0.6, -0.3], [0.6, 1.0, 0.4], [-0.3, 0.4, 0.5]])
MEAN = np.array([1.0, -2.0, 0.5])
LOGITS = np.array([1.0, 0.0, -1.5, 0.3])


def truncated(mean, std, low, high):
    return scipy.stats.truncnorm((low - mean) / std, (high - mean) / std, loc=mean, scale=std)


def kumaraswamy_cdf(a, b):
    return lambda x: 1 - (1 - x**a) ** b


ONE_DIMENSION = {  # distribution, parameters, and the same in SciPy
    "gaussian": (ge.GAUSSIAN, (1.5, 0.7), scipy.stats.norm(1.5, 0.7)),
    **{
        f"truncated {p}": (ge.TRUNCATED_NORMAL, p, truncated(*p))
        for p in (
            (0.3, 0.8, -1.0, 2.0),
            (0.0, 1.0, -np.inf, np.inf),
            (1.0, 2.0, -np.inf, 0.0),
            (1.0, 2.0, 3.0, np.inf),
            (0.0, 1.0, 8.0, 8.5),
            (0.0, 1.0, -30.0, -29.9),
            (0.0, 1.0, 50.0, np.inf),
            (2.0, 0.125, -8.0, -7.9921875),
        )
    },
}


@pytest.mark.quick
@pytest.mark.parametrize("name", ONE_DIMENSION)
def test_samples_follow_the_cdf_and_densities_equal_scipy(name):
    distribution, params, reference = ONE_DIMENSION[name]
    x = np.asarray(distribution.sample(params, distribution.noise(random.key(0), (N,))), np.float64)
    assert scipy.stats.kstest(x, reference.cdf).pvalue > 0.01
    log_prob = distribution.log_prob(params, jnp.asarray(x, jnp.float32))
    # in the far tail the logarithm is the difference of numbers of the size of the bound's square
    far = np.abs([z for z in (np.asarray(params[2:]) - params[0]) / params[1] if np.isfinite(z)]).max(initial=1)
    np.testing.assert_allclose(log_prob, reference.logpdf(x), rtol=2e-5, atol=1e-5 + 2e-6 * far**2)


@pytest.mark.quick
@pytest.mark.parametrize("params", [(2.0, 3.0), (0.5, 0.5), (1.0, 1.0), (5.0, 0.3), (0.1, 8.0)])
def test_kumaraswamy(params):
    a, b = params
    x = np.asarray(ge.KUMARASWAMY.sample(params, ge.KUMARASWAMY.noise(random.key(0), (N,))), np.float64)
    assert ((x > 0) & (x < 1)).all()
    inside, cdf = x[x < 0.999], kumaraswamy_cdf(a, b)  # float32 has few numbers below 1
    assert scipy.stats.kstest(inside, lambda t: cdf(t) / cdf(0.999)).pvalue > 0.01
    t = np.linspace(0.01, 0.99, 99)
    expected = tfp.distributions.Kumaraswamy(a, b).log_prob(t)
    np.testing.assert_allclose(ge.KUMARASWAMY.log_prob(params, jnp.asarray(t)), expected, rtol=1e-4, atol=1e-5)
    mass, _ = scipy.integrate.quad(lambda t: a * b * t ** (a - 1) * (1 - t**a) ** (b - 1), 0.2, 0.7)
    ours, _ = scipy.integrate.quad(lambda t: float(jnp.exp(ge.KUMARASWAMY.log_prob(params, t))), 0.2, 0.7, epsrel=1e-5)
    np.testing.assert_allclose(ours, mass, rtol=1e-5)


@pytest.mark.quick
def test_multivariate_gaussian():
    params = jnp.asarray(MEAN), jnp.linalg.cholesky(jnp.asarray(COVARIANCE))
    reference = scipy.stats.multivariate_normal(MEAN, COVARIANCE)
    x = ge.MULTIVARIATE_GAUSSIAN.sample(params, ge.MULTIVARIATE_GAUSSIAN.noise(random.key(0), (N, 3)))
    np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=6 * np.sqrt(2 / N))
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=6 * 2 * np.sqrt(2 / N))
    direction = np.array([0.5, -1.0, 2.0])
    projected = scipy.stats.norm(MEAN @ direction, np.sqrt(direction @ COVARIANCE @ direction))
    assert scipy.stats.kstest(np.asarray(x) @ direction, projected.cdf).pvalue > 0.01
    log_prob = ge.MULTIVARIATE_GAUSSIAN.log_prob(params, x)
    np.testing.assert_allclose(log_prob, reference.logpdf(np.asarray(x)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ge.MULTIVARIATE_GAUSSIAN.log_prob(params, x[7]), log_prob[7], rtol=1e-5)


@pytest.mark.quick
def test_gumbel_max_is_categorical():
    x = ge.GUMBEL_MAX.sample(jnp.asarray(LOGITS), ge.GUMBEL_MAX.noise(random.key(0), (N, 4)))
    probabilities = scipy.special.softmax(LOGITS)
    assert set(np.unique(x)) == {0.0, 1.0}
    np.testing.assert_array_equal(x.sum(axis=1), 1)
    assert scipy.stats.chisquare(np.asarray(x, np.float64).sum(axis=0), N * probabilities).pvalue > 0.01
    np.testing.assert_allclose(
        ge.GUMBEL_MAX.log_prob(jnp.asarray(LOGITS), jnp.eye(4)), np.log(probabilities), rtol=1e-6
    )


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_gumbel_softmax(temperature):
    params = jnp.asarray(LOGITS), temperature
    noise = ge.GUMBEL_SOFTMAX.noise(random.key(0), (N, 4))
    x = ge.GUMBEL_SOFTMAX.sample(params, noise)
    np.testing.assert_allclose(x.sum(axis=1), 1, rtol=1e-5)
    # the order of the coordinates is that of the perturbed logits, so the largest is the categorical sample
    np.testing.assert_array_equal(x.argmax(axis=1), ge.GUMBEL_MAX.sample(jnp.asarray(LOGITS), noise).argmax(axis=1))
    # log-ratios of coordinates follow a logistic law
    ratio = temperature * (np.log(x[:, 0]) - np.log(x[:, 1]))
    ratio = ratio[np.isfinite(ratio)]
    assert len(ratio) > 0.999 * N
    assert scipy.stats.kstest(ratio, scipy.stats.logistic(LOGITS[0] - LOGITS[1]).cdf).pvalue > 0.01
    inside = x[(x > 1e-6).all(axis=1)][:500]
    expected = tfp.distributions.RelaxedOneHotCategorical(temperature, logits=LOGITS).log_prob(inside)
    np.testing.assert_allclose(ge.GUMBEL_SOFTMAX.log_prob(params, inside), expected, rtol=1e-4, atol=1e-3)


# Derivatives through the samples


@pytest.fixture
def float64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def quantile(name):
    """The quantile function in SciPy, of `(params, noise)`."""
    return {
        "gaussian": lambda p, u: scipy.stats.norm.ppf(u, *p),
        "truncated": lambda p, u: truncated(*p).ppf(u),
        "kumaraswamy": lambda p, u: (1 - (1 - u) ** (1 / p[1])) ** (1 / p[0]),
    }[name]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("gaussian", (1.5, 0.7)),
        ("truncated", (0.3, 0.8, -1.0, 2.0)),
        ("truncated", (0.0, 1.0, 5.0, 7.0)),
        ("truncated", (0.0, 1.0, -7.0, -5.0)),
        ("truncated", (1.0, 2.0, -3.0, np.inf)),
        ("kumaraswamy", (2.0, 3.0)),
        ("kumaraswamy", (0.5, 0.5)),
    ],
)
def test_pathwise_derivatives_equal_differences_of_the_quantile_function(float64, name, params):
    u, eps = np.array([0.05, 0.3, 0.5, 0.8, 0.99]), 1e-5
    sample = {
        "gaussian": lambda p, u: ge.gaussian_sample(p, scipy.special.ndtri(u)),
        "truncated": ge.truncated_normal_sample,
        "kumaraswamy": ge.kumaraswamy_sample,
    }[name]
    np.testing.assert_allclose(sample(params, u), quantile(name)(params, u), rtol=1e-9)
    jacobian = jax.jacfwd(sample)(params, u)
    for i, p in enumerate(params):
        if np.isfinite(p):
            above, below = ((*params[:i], p + d, *params[i + 1 :]) for d in (eps, -eps))
            difference = (quantile(name)(above, u) - quantile(name)(below, u)) / (2 * eps)
            np.testing.assert_allclose(jacobian[i], difference, rtol=1e-5, atol=1e-8)


def test_log_quantile_of_the_normal(float64):
    log_p = -np.geomspace(1e-3, 5e5, 60)
    np.testing.assert_allclose(ge.log_ndtri(jnp.asarray(log_p)), scipy.special.ndtri_exp(log_p), rtol=1e-9)


@pytest.mark.parametrize(
    ("distribution", "params", "shape"),
    [
        (ge.TRUNCATED_NORMAL, (0.0, 1.0, 60.0, 61.0), (1000,)),
        (ge.TRUNCATED_NORMAL, (0.0, 1.0, -100.0, -99.0), (1000,)),
        (ge.TRUNCATED_NORMAL, (0.0, 1e-3, -1.0, 1.0), (1000,)),
        (ge.TRUNCATED_NORMAL, (0.0, 1e3, -1.0, 1.0), (1000,)),
        (ge.TRUNCATED_NORMAL, (0.0, 1.0, -np.inf, np.inf), (1000,)),
        (ge.KUMARASWAMY, (1e-2, 1e-2), (1000,)),
        (ge.KUMARASWAMY, (1e3, 1e3), (1000,)),
        (ge.KUMARASWAMY, (1e-2, 1e3), (1000,)),
        (ge.GUMBEL_SOFTMAX, (LOGITS, 1e-3), (1000, 4)),
        (ge.GUMBEL_SOFTMAX, (LOGITS, 1e3), (1000, 4)),
        (ge.GUMBEL_SOFTMAX, (np.array([500.0, -500.0, 0.0]), 0.1), (1000, 3)),
    ],
)
def test_edges_are_finite(distribution, params, shape):
    """Samples, densities and derivatives, also at the ends of the noise."""
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    noise = distribution.noise(random.key(0), shape)
    if len(shape) == 1:
        ends = [jnp.finfo(jnp.float32).tiny, 1 - 2.0**-24]
        noise = jnp.concatenate([noise, jnp.array(ends, jnp.float32)])
    x = distribution.sample(params, noise)
    gradient = jax.grad(lambda params: distribution.sample(params, noise).sum())(params)
    for values in (x, distribution.log_prob(params, x), *jax.tree.leaves(gradient)):
        assert np.isfinite(values).all()
    if distribution is ge.TRUNCATED_NORMAL:
        assert (params[2] <= x.min()) & (x.max() <= params[3])


# Estimators


def closed_form_variances(theta, n):
    """Of the naive, score-function and reparameterized estimates of x^2 theta's derivative, by quadrature."""
    x, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    x = x + theta

    def variance(values):
        return weights @ values**2 - (weights @ values) ** 2

    return np.array([variance(x**2), variance(x**2 * theta * (x - theta) + x**2), variance(x**2 + 2 * theta * x)]) / n


@pytest.mark.quick
@pytest.mark.parametrize("theta", [1.0, -0.5])
def test_bias_and_variance_are_those_of_the_closed_form(theta):
    config = ge.Config(theta=theta, batch_size=100, num_trials=2000)
    estimates = jax.jit(ge.train)(config, random.key(0))
    variances = closed_form_variances(theta, 100)
    biases = [1 + theta**2 - (1 + 3 * theta**2), 0, 0]
    for values, bias, variance in zip(estimates, biases, variances, strict=True):
        statistics = ge.summarize(values, ge.true_derivative(config))
        assert abs(statistics.bias - bias) < 4 * np.sqrt(variance / 2000)
        np.testing.assert_allclose(statistics.variance, variance, rtol=0.15)  # its standard error is 3 to 4 %
        np.testing.assert_allclose(statistics.mse, np.mean((np.asarray(values) - 1 - 3 * theta**2) ** 2), rtol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("function", ge.FUNCTIONS)
def test_true_derivatives_equal_quadrature(function):
    f, derivative = ge.FUNCTIONS[function]

    def expectation(theta):
        density = scipy.stats.norm(theta, 1).pdf
        return scipy.integrate.quad(lambda x: float(f(x, theta)) * density(x), -9, 9, points=[0], limit=200)[0]

    theta, eps = 0.4, 1e-3
    difference = (expectation(theta + eps) - expectation(theta - eps)) / (2 * eps)
    np.testing.assert_allclose(derivative(theta), difference, rtol=1e-4)


@pytest.mark.parametrize("function", ge.FUNCTIONS)
def test_which_estimators_are_unbiased(function):
    config = ge.Config(theta=0.4, batch_size=500, num_trials=400, function=function)
    estimates, truth = jax.jit(ge.train)(config, random.key(1)), ge.true_derivative(config)
    unbiased = [abs(x.mean() - truth) < 4 * x.std() / np.sqrt(400) for x in estimates]
    assert unbiased == [False, True, function != "step"]


def test_estimators_take_any_distribution_and_any_parameters():
    """E[sum of A_ij x_i x_j] for x ~ N(mean, L L^T) has derivatives 2 A mean and the lower triangle of 2 A L."""
    A = jnp.array([[1.0, 0.3], [0.3, 2.0]])
    theta = (jnp.array([0.5, -1.0]), jnp.array([[1.0, 0.0], [0.4, 0.8]]))
    f = lambda x, theta: ((x @ A) * x).sum(axis=-1)
    expected = 2 * A @ theta[0], jnp.tril(2 * A @ theta[1])

    def estimates(estimator):
        def estimate(key):
            mean, cholesky = estimator(f, ge.MULTIVARIATE_GAUSSIAN, theta, random.normal(key, (1000, 2)))
            return mean, jnp.tril(cholesky)

        return jax.jit(lambda: jax.lax.map(estimate, random.split(random.key(0), 200)))()

    for estimator in (ge.score_function, ge.reparameterized):
        for values, truth in zip(estimates(estimator), expected, strict=True):
            error = np.abs(values.mean(axis=0) - truth)
            assert (error <= 4.5 * values.std(axis=0) / np.sqrt(200) + 1e-6).all()


def test_vmaps_over_theta():
    thetas = jnp.array([0.0, 1.0, 2.0])
    configs = ge.Config(theta=thetas, batch_size=50, num_trials=20)
    together = jax.vmap(ge.train, in_axes=(0, None))(configs, random.key(0))
    for i, theta in enumerate(thetas):
        alone = ge.train(ge.Config(theta=float(theta), batch_size=50, num_trials=20), random.key(0))
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-5)


# The demonstration


def demonstrate(monkeypatch, capsys, *flags):
    """`(exit code, stdout, stderr)` of the command."""
    monkeypatch.setattr(sys, "argv", ["gradient_estimators.py", *map(str, flags)])
    code = 0
    try:
        demo.main(ge.Config, ge.train, ge.true_derivative, ge.summarize)
    except SystemExit as end:
        code = end.code
    finally:
        jax.config.update("jax_threefry_partitionable", True)
    return code, *capsys.readouterr()


def test_the_published_table(monkeypatch, capsys, tmp_path):
    code, out, _ = demonstrate(monkeypatch, capsys, "--chapter-table", "--out", tmp_path)
    rows = {line[:17].strip(): line[17:].split() for line in out.splitlines()[4:7]}
    assert code == 0
    assert rows == {
        "naive": ["1.999266", "-2.000734", "0.005756", "4.008693"],
        "score function": ["3.995299", "-0.004701", "0.058130", "0.058152"],
        "reparameterized": ["3.999579", "-0.000421", "0.017229", "0.017230"],
    }
    folder = tmp_path / "gradient_estimators" / "product" / "chapter-table"
    assert {path.name for path in folder.iterdir()} == {"config.json", "estimates.csv", "estimates.png"}
    with open(folder / "estimates.csv", newline="") as file:
        columns = [np.array(x, np.float64) for x in zip(*list(csv.reader(file))[1:], strict=True)]
    np.testing.assert_allclose([x.mean() for x in columns], [1.999266, 3.995299, 3.999579], atol=1e-6)


def test_the_same_command_writes_the_same_files(monkeypatch, capsys, tmp_path):
    flags = "--theta", 0.5, "--batch-size", 10, "--num-trials", 20, "--function", "step", "--out"
    for name in ("a", "b"):
        assert demonstrate(monkeypatch, capsys, *flags, tmp_path / name)[0] == 0
    a, b = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("a", "b")
    )
    assert len(a) == 3
    assert a == b


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--batch-size", 0), "--batch-size 0"),
        (("--num-trials", 1), "--num-trials 1"),
        (("--theta", "nan"), "--theta nan"),
        (("--theta", 1e30), "--theta 1e+30"),
        (("--function", "cube"), "cube"),
        (("--seed", -1), "--seed -1"),
        (("--chapter-table", "--theta", 2), "--chapter-table"),
    ],
)
def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path, flags, named):
    code, _, err = demonstrate(monkeypatch, capsys, *flags, "--out", tmp_path)
    assert code == 2
    assert named in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
