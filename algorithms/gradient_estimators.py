"""Three estimators of the derivative of an expectation, d/dtheta E[f(x, theta)] with x ~ p(x; theta), compared.

The samples depend on theta, so the derivative of their average with the samples fixed is biased. Unbiased estimators
differentiate the density (score function) or the sample as a function of noise free of theta (reparameterization). The
demonstration has x ~ N(theta, 1) and by default f(x, theta) = x^2 theta, whose derivative is 1 + 3 theta^2.

    repeat num_trials times:
        draw noise e_1, ..., e_n and samples x_i = g(e_i, theta)
        naive           = mean of df(x_i, theta)/dtheta, x_i fixed
        score function  = mean of f(x_i, theta) * dlog p(x_i; theta)/dtheta + df(x_i, theta)/dtheta, x_i fixed
        reparameterized = mean of df(g(e_i, theta), theta)/dtheta, through both arguments
    over the trials: mean, bias, variance and mean squared error of each

Sources: Mohamed et al., "Monte Carlo Gradient Estimation in Machine Learning" (JMLR 21, 2020), sections 4 and 5; Glynn
(Communications of the ACM 33, 1990); Williams (Machine Learning 8, 1992), section 4; Kingma, Welling (ICLR 2014),
section 2.4; Kumaraswamy (Journal of Hydrology 46, 1980); Jang et al. and Maddison et al. (both ICLR 2017).

Limits: the reparameterized estimator is biased where f is discontinuous in x, as `step` is. Gumbel-max samples have no
derivative; Gumbel-softmax is a relaxation, with less bias and more variance at a lower temperature.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.linalg import solve_triangular
from jax.scipy.special import gammaln, log_ndtr, ndtri
from jax.scipy.stats import norm

Count = Annotated[int, "from 1 to 2147483647"]  # a plain int may be 0 or negative


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Config:
    """Hyperparameters. Static fields set shapes and loop lengths; theta can be traced and vmapped."""

    theta: float = 1.0  # mean of the Gaussian x ~ N(theta, 1), and second argument of f
    batch_size: Count = jax.tree.static(default=1_000)  # samples per estimate
    num_trials: Count = jax.tree.static(default=1_000)  # independent estimates
    # f(x, theta): x^2 theta, x^2, e^x, sin x, or 1 where x > 0 and 0 elsewhere
    function: Literal["product", "square", "exp", "sin", "step"] = jax.tree.static(default="product")


class Distribution(NamedTuple):
    """A distribution as pure functions; parameters broadcast against noise and x."""

    noise: Callable  # (key, shape) -> noise, independent of the parameters
    sample: Callable  # (params, noise) -> x
    log_prob: Callable  # (params, x) -> logarithm of the density or probability of x


class Estimates(NamedTuple):
    """Estimates of the derivative; leaves have a leading axis [num_trials]."""

    naive: jax.Array
    score_function: jax.Array
    reparameterized: jax.Array


class Statistics(NamedTuple):
    """Statistics of an estimator over the trials."""

    mean: jax.Array  # []
    bias: jax.Array  # [], mean minus the true derivative
    variance: jax.Array  # [], of one estimate
    mse: jax.Array  # [], mean squared error: bias^2 + variance


# Estimators, for any f(x, theta) -> [batch] and any pytree theta


def naive(f, distribution, theta, noise):
    """Derivative of the average over fixed samples: biased, since the samples depend on theta."""
    x = lax.stop_gradient(distribution.sample(theta, noise))
    return jax.grad(lambda theta: f(x, theta).mean())(theta)


def score_function(f, distribution, theta, noise):
    """Likelihood-ratio derivative of the average over fixed samples: unbiased, also where f is discontinuous in x."""
    x = lax.stop_gradient(distribution.sample(theta, noise))

    def average(theta):
        value = f(x, theta)
        return (lax.stop_gradient(value) * distribution.log_prob(theta, x) + value).mean()

    return jax.grad(average)(theta)


def reparameterized(f, distribution, theta, noise):
    """Derivative of the average through the samples: unbiased where f is continuous in x, and x in theta."""
    return jax.grad(lambda theta: f(distribution.sample(theta, noise), theta).mean())(theta)


# Distributions


def uniform_noise(key, shape):
    """Uniform on the open interval (0, 1), since a quantile function may be infinite at either end."""
    return random.uniform(key, shape, minval=jnp.finfo(float).tiny)


def gaussian_sample(params, noise):
    """`mean + std * noise`, with `params = (mean, std)` and standard normal noise."""
    mean, std = params
    return mean + std * noise


def gaussian_log_prob(params, x):
    """Log-density of N(mean, std^2)."""
    return norm.logpdf(x, *params)


def multivariate_gaussian_sample(params, noise):
    """`mean + L noise [..., n]`, with `params = (mean [n], L [n, n])` and covariance L L^T (Cholesky)."""
    mean, cholesky = params
    return mean + noise @ cholesky.T


def multivariate_gaussian_log_prob(params, x):
    """Log-density of N(mean, L L^T) at `x [..., n]`: `[...]`."""
    mean, cholesky = params
    white = solve_triangular(cholesky, (x - mean).reshape(-1, len(mean)).T, lower=True)
    return norm.logpdf(white).sum(axis=0).reshape(x.shape[:-1]) - jnp.log(jnp.abs(jnp.diagonal(cholesky))).sum()


@jax.custom_jvp
def log_ndtri(log_p):
    """Quantile of the standard normal at probability `exp(log_p)`, also where that underflows."""
    t = jnp.minimum(log_p, -5.0)
    x = -jnp.sqrt(-2 * t - jnp.log(-4 * jnp.pi * t))  # first term of the tail's asymptotic series
    for _ in range(4):  # Newton's method on log_ndtr(x) = t
        x = x - (log_ndtr(x) - t) * jnp.exp(log_ndtr(x) - norm.logpdf(x))
    return jnp.where(log_p < -5, x, ndtri(jnp.exp(log_p)))


@log_ndtri.defjvp
def _(primals, tangents):
    """The inverse of the hazard rate, by the implicit function theorem."""
    (log_p,), (tangent,) = primals, tangents
    x = log_ndtri(log_p)
    return x, jnp.exp(log_p - norm.logpdf(x)) * tangent


def standard_bounds(params):
    """`(left, right, mirrored)`: bounds in standard deviations, mirrored to the left, where log_ndtr is accurate."""
    mean, std, low, high = params
    # an infinite bound is put 10,000 standard deviations away
    low, high = (jnp.where(jnp.isfinite(x), x, mean + jnp.sign(x) * 1e4 * std) for x in (low, high))
    a, b = (low - mean) / std, (high - mean) / std
    mirrored = a + b > 0
    return jnp.where(mirrored, -b, a), jnp.where(mirrored, -a, b), mirrored


def truncated_normal_sample(params, noise):
    """Quantile of uniform noise, with `params = (mean, std, low, high)`; bounds may be infinite.

    In float32 accurate to a thousandth of the sample's standard deviation, for bounds up to 100 of the normal's away.
    """
    mean, std, low, high = params
    left, right, mirrored = standard_bounds(params)
    u = jnp.where(mirrored, 1 - noise, noise)
    log_p = jnp.logaddexp(log_ndtr(left) + jnp.log1p(-u), log_ndtr(right) + jnp.log(u))
    x = log_ndtri(log_p)
    return jnp.clip(mean + std * jnp.where(mirrored, -x, x), low, high)


def truncated_normal_log_prob(params, x):
    """Log-density of N(mean, std^2) on `[low, high]`; -inf outside."""
    mean, std, low, high = params
    left, right, _ = standard_bounds(params)
    log_mass = log_ndtr(right) + jnp.log(-jnp.expm1(log_ndtr(left) - log_ndtr(right)))
    return jnp.where((low <= x) & (x <= high), norm.logpdf(x, mean, std) - log_mass, -jnp.inf)


def kumaraswamy_sample(params, noise):
    """`(1 - (1 - noise)^(1 / b))^(1 / a)`, in (0, 1), with `params = (a, b)` positive and uniform noise."""
    a, b = params
    ends = jnp.finfo(noise.dtype)
    x = jnp.exp(jnp.log(jnp.maximum(-jnp.expm1(jnp.log1p(-noise) / b), ends.tiny)) / a)
    return jnp.clip(x, ends.tiny, 1 - ends.epsneg)  # rounding must not put it on 0 or 1


def kumaraswamy_log_prob(params, x):
    """Log-density `log(a b x^(a - 1) (1 - x^a)^(b - 1))` for x in (0, 1)."""
    a, b = params
    log_x = jnp.log(x)
    return jnp.log(a) + jnp.log(b) + (a - 1) * log_x + (b - 1) * jnp.log(-jnp.expm1(a * log_x))


def gumbel_max_sample(logits, noise):
    """One-hot `[..., n]` of the largest of `logits [n] + noise [..., n]`, with Gumbel noise: categorical."""
    return jax.nn.one_hot(jnp.argmax(logits + noise, axis=-1), noise.shape[-1], dtype=noise.dtype)


def gumbel_max_log_prob(logits, x):
    """Log-probability `[...]` of one-hot `x [..., n]`."""
    return (x * jax.nn.log_softmax(logits)).sum(axis=-1)


def gumbel_softmax_sample(params, noise):
    """Softmax `[..., n]` of `(logits + noise) / temperature`, with `params = (logits [n], temperature)`."""
    logits, temperature = params
    return jax.nn.softmax((logits + noise) / temperature)


def gumbel_softmax_log_prob(params, x):
    """Log-density `[...]` at `x [..., n]` with respect to the first n - 1 of its coordinates (Jang et al., eq. 4)."""
    logits, temperature = params
    n, log_x = x.shape[-1], jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
    z = jax.nn.log_softmax(logits) - temperature * log_x
    constant = gammaln(n) + (n - 1) * jnp.log(temperature)
    return constant - n * jax.nn.logsumexp(z, axis=-1) + (z - log_x).sum(axis=-1)


GAUSSIAN = Distribution(random.normal, gaussian_sample, gaussian_log_prob)
MULTIVARIATE_GAUSSIAN = Distribution(random.normal, multivariate_gaussian_sample, multivariate_gaussian_log_prob)
TRUNCATED_NORMAL = Distribution(uniform_noise, truncated_normal_sample, truncated_normal_log_prob)
KUMARASWAMY = Distribution(uniform_noise, kumaraswamy_sample, kumaraswamy_log_prob)
GUMBEL_MAX = Distribution(random.gumbel, gumbel_max_sample, gumbel_max_log_prob)
GUMBEL_SOFTMAX = Distribution(random.gumbel, gumbel_softmax_sample, gumbel_softmax_log_prob)


# Demonstration

UNIT_GAUSSIAN = Distribution(random.normal, lambda theta, noise: theta + noise, lambda theta, x: norm.logpdf(x, theta))
FUNCTIONS = {  # f(x, theta), and the derivative of its expectation over x ~ N(theta, 1)
    "product": (lambda x, theta: x**2 * theta, lambda theta: 1 + 3 * theta**2),
    "square": (lambda x, theta: x**2, lambda theta: 2 * theta),
    "exp": (lambda x, theta: jnp.exp(x), lambda theta: jnp.exp(theta + 0.5)),
    "sin": (lambda x, theta: jnp.sin(x), lambda theta: jnp.cos(theta) * jnp.exp(-0.5)),
    "step": (lambda x, theta: jnp.where(x > 0, 1.0, 0.0), lambda theta: norm.pdf(theta)),
}

RULES = {
    "finite": np.isfinite,
    "> 0": lambda x: np.isfinite(x) & (x > 0),
    ">= 0": lambda x: np.isfinite(x) & (x >= 0),
    "in [0, 1]": lambda x: (x >= 0) & (x <= 1),
    "from 1 to 2147483647": lambda x: (x >= 1) & (x < 2**31),
}


def check(config):
    """ValueError `field=value: must be RULE` where a number breaks its field's rule; traced ones cannot be checked."""
    for field in dataclasses.fields(config):
        (rule,) = getattr(field.type, "__metadata__", ["finite"])
        for x in jax.tree.leaves(getattr(config, field.name)):
            if not isinstance(x, str | jax.core.Tracer) and not np.all(RULES[rule](x)):
                raise ValueError(f"{field.name}={x}: must be {rule}")


def train(config, key):
    """All trials, a pure function: `Estimates`. The three estimators of a trial share its noise."""
    check(config)
    f, _ = FUNCTIONS[config.function]

    def trial(key):
        noise = UNIT_GAUSSIAN.noise(key, (config.batch_size,))
        arguments = f, UNIT_GAUSSIAN, jnp.asarray(config.theta, float), noise
        return Estimates(naive(*arguments), score_function(*arguments), reparameterized(*arguments))

    # in batches, so that memory does not grow with the number of trials
    return lax.map(trial, random.split(key, config.num_trials), batch_size=min(100, config.num_trials))


def true_derivative(config):
    """Closed form of the derivative."""
    return FUNCTIONS[config.function][1](config.theta)


def summarize(estimates, truth):
    """`Statistics` of `estimates [num_trials]`."""
    bias, variance = estimates.mean() - truth, estimates.var()
    return Statistics(estimates.mean(), bias, variance, bias**2 + variance)


if __name__ == "__main__":
    from amortax.common.demo import main

    main(Config, train, true_derivative, summarize)
