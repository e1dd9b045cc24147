"""Exact maximizers over actions, by mixed-integer programming with HiGHS: the reference for all other maximizers.

`relu_network` maximizes a ReLU network over a box; `linear` a linear function of integers under linear constraints.
Both run on the host, one problem at a time; `maximize` calls the first from a compiled program.

Source: Tjeng, Xiao, Tedrake, "Evaluating Robustness of Neural Networks with Mixed Integer Programming" (ICLR 2019),
section 4.1 and equation 6; Ryu et al., "CAQL: Continuous Action Q-Learning" (ICLR 2020), section 3.1, for its use here.
"""

from typing import NamedTuple

import jax
import numpy as np
from scipy import optimize, sparse

TIME_LIMIT = 60.0  # seconds for a problem, by default
TOLERANCE = 1e-6  # relative gap between a solution and its bound that counts as zero
failures = []  # exceptions of `maximize` on the host


class Solution(NamedTuple):
    """A maximizer, its value, and the proof: no value exceeds `bound`."""

    action: np.ndarray  # [action_dim]
    value: float
    bound: float

    @property
    def gap(self):
        """By how much the maximum can exceed `value`."""
        return max(0.0, self.bound - self.value)


def solve(objective, integrality, low, high, matrix, lower, upper, time_limit):
    """Maximize `objective @ x` over `low <= x <= high`, `lower <= matrix @ x <= upper`: `(x, bound)`.

    TimeoutError if the time limit is reached before the proof; ValueError if the constraints cannot be satisfied.
    """
    result = optimize.milp(
        -np.asarray(objective),
        integrality=integrality,
        bounds=optimize.Bounds(low, high),
        constraints=optimize.LinearConstraint(matrix, lower, upper),
        options={"time_limit": time_limit, "mip_rel_gap": TOLERANCE},
    )
    if result.status == 1:
        found = "nothing found" if result.x is None else f"best value {-result.fun:g}, bound {-result.mip_dual_bound:g}"
        raise TimeoutError(f"no proven maximum within time_limit={time_limit:g} s: {found}")
    if result.x is None:
        raise ValueError(f"no maximum: {result.message}")
    bound = result.mip_dual_bound
    return result.x, -(result.fun if bound is None else bound)  # exact, without a bound, if nothing is an integer


def relu_network(layers, obs, low=-1.0, high=1.0, time_limit=TIME_LIMIT):
    """Maximize a network over actions between `low` and `high` for one `obs [obs_dim]`: `Solution`.

    `layers` are `[(weights [n, m], biases [m]), ...]` on `concatenate([obs, action])`, with ReLU between them and one
    output. A unit whose sign is the same for all actions is linear; each other unit takes a binary variable and bounds
    from interval arithmetic. TimeoutError if the time limit is reached before the proof.
    """
    layers = [(np.asarray(w, np.float64), np.asarray(b, np.float64)) for w, b in layers]
    obs = np.asarray(obs, np.float64)
    (w, b), *rest = layers
    action_dim = len(w) - len(obs)
    layers = [(w[len(obs) :], b + obs @ w[: len(obs)]), *rest]
    x_low, x_high = np.broadcast_to(low, action_dim), np.broadcast_to(high, action_dim)
    lows, highs = [x_low], [x_high]  # of all variables
    integrality = [np.zeros(action_dim)]
    rows, lower, upper = [], [], []  # constraints: lower <= sum of coefficient * variable <= upper
    inputs = np.arange(action_dim)  # the variables that feed the layer
    count = action_dim

    def constrain(variables, coefficients, at_least, at_most):
        rows.append((variables, coefficients))
        lower.append(at_least)
        upper.append(at_most)

    for w, b in layers[:-1]:
        z_low = np.maximum(w, 0).T @ x_low + np.minimum(w, 0).T @ x_high + b
        z_high = np.maximum(w, 0).T @ x_high + np.minimum(w, 0).T @ x_low + b
        x_low, x_high = np.maximum(z_low, 0), np.maximum(z_high, 0)
        units = count + np.arange(len(b))
        switching = np.flatnonzero((z_low < 0) & (z_high > 0))
        switch = dict(zip(switching, count + len(b) + np.arange(len(switching)), strict=True))
        count += len(b) + len(switching)
        lows += [x_low, np.zeros(len(switching))]
        highs += [x_high, np.ones(len(switching))]
        integrality += [np.zeros(len(b)), np.ones(len(switching))]
        for j, unit in enumerate(units):
            if z_high[j] <= 0:
                continue  # its bounds are 0 and 0
            # out - z = 0, or for a switching unit with on in {0, 1}:
            # 0 <= out - z <= -z_low (1 - on), out <= z_high on
            variables, coefficients = [unit, *inputs], [1.0, *-w[:, j]]
            if j not in switch:
                constrain(variables, coefficients, b[j], b[j])
                continue
            constrain(variables, coefficients, b[j], np.inf)
            constrain([*variables, switch[j]], [*coefficients, -z_low[j]], -np.inf, b[j] - z_low[j])
            constrain([unit, switch[j]], [1.0, -z_high[j]], -np.inf, 0.0)
        inputs = units
    w, b = layers[-1]
    objective = np.zeros(count)
    objective[inputs] = w[:, 0]
    matrix = sparse.lil_array((len(rows), count))
    for i, (variables, coefficients) in enumerate(rows):
        matrix[[i], variables] = coefficients
    low, high, integrality = (np.concatenate(x) for x in (lows, highs, integrality))
    x, bound = solve(objective, integrality, low, high, matrix.tocsr(), lower, upper, time_limit)
    action = np.clip(x[:action_dim], lows[0], highs[0])
    return Solution(action, forward(layers, action), bound + float(b[0]))


def forward(layers, x):
    """Output of a ReLU network with one output unit."""
    for w, b in layers[:-1]:
        x = np.maximum(x @ w + b, 0)
    w, b = layers[-1]
    return float((x @ w + b)[0])


def linear(weights, matrix, upper, low=0, high=1, time_limit=TIME_LIMIT):
    """Maximize `weights @ a` over integers `a [n]` from `low` to `high` with `matrix @ a <= upper`: `Solution`.

    For a Q-function that is linear in a large vector of choices. TimeoutError if the time limit is reached before the
    proof; ValueError if the constraints cannot be satisfied.
    """
    weights, matrix = np.asarray(weights, np.float64), np.atleast_2d(matrix)
    n = len(weights)
    low, high = np.broadcast_to(low, n), np.broadcast_to(high, n)
    x, bound = solve(weights, np.ones(n), low, high, matrix, -np.inf, np.atleast_1d(upper), time_limit)
    action = np.round(x)
    return Solution(action, float(weights @ action), bound)


def maximize(q, config, critic_params, obs, key):
    """A maximizer for `algorithms/fqi.py`: action `[action_dim]` for one `obs [obs_dim]`, computed on the host.

    ValueError unless q is a ReLU network. An exception on the host reaches the caller of the program as an error of the
    runtime, and is appended to `failures`.
    """
    if config.activation != "relu" or getattr(config, "approximator", "mlp") != "mlp":
        raise ValueError("must be used with a network, and with activation relu")
    action_dim = critic_params[0][0].shape[0] - obs.shape[0]

    def call(layers, obs):
        try:
            return relu_network(layers, obs, time_limit=TIME_LIMIT).action.astype(np.float32)
        except Exception as error:
            failures.append(error)
            raise

    shape = jax.ShapeDtypeStruct((action_dim,), np.float32)
    return jax.pure_callback(call, shape, critic_params, obs, vmap_method="sequential")
