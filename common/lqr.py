"""Linear-quadratic regulation: environments whose optimal policies are known in closed form, to validate algorithms.

The state follows s' = A s + B a + w with w ~ N(0, W), and the reward of a step is -(s^T Q s + a^T R a). Importing this
module registers `LQR1-v0`, `LQR-v0` and `LQR4-v0` with gymnax, of 1, 2 and 4 state dimensions; `LQR` takes a system of
any dimension.

Sources: Bertsekas, "Dynamic Programming and Optimal Control", volume II, section 4.2 (discounted linear-quadratic
problems); Levine, "Reinforcement Learning and Control as Probabilistic Inference" (arXiv 1805.00909, 2018), section 2.3
(the Boltzmann policy of a soft value).
"""

from typing import NamedTuple

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces
from jax import lax, random

ENVS = {"LQR1-v0": 1, "LQR-v0": 2, "LQR4-v0": 4}  # dimensions of the state
ACTION_BOUND = 2.5  # several times the actions of the optimal policies, so that it does not affect them


@struct.dataclass(kw_only=True)
class EnvState(environment.EnvState):
    """A state of the system and the time."""

    position: jax.Array  # [n]
    time: int


@struct.dataclass(kw_only=True)
class EnvParams(environment.EnvParams):
    """A system; arrays may have leading axes under vmap."""

    A: jax.Array  # [n, n]
    B: jax.Array  # [n, m]
    Q: jax.Array  # [n, n], symmetric, positive semidefinite
    R: jax.Array  # [m, m], symmetric, positive definite
    noise: jax.Array  # [n, n], a square root of W: W = noise @ noise.T
    max_steps_in_episode: int = 20


def system(dims):
    """Parameters of a leaky integrator (1 dimension), a damped cart on a spring (2), or two such carts coupled (4)."""
    dt = 0.5
    if dims == 1:
        A, B = [[0.9]], [[0.5]]
    elif dims == 2:
        A = np.eye(2) + dt * np.array([[0, 1], [-0.4, -0.4]])
        B = [[dt**2 / 2], [dt]]
    elif dims == 4:
        A = np.eye(4) + dt * np.array([[0, 0, 1, 0], [0, 0, 0, 1], [-0.8, 0.4, -0.4, 0], [0.4, -0.8, 0, -0.4]])
        B = [[dt**2 / 2, 0], [0, dt**2 / 2], [dt, 0], [0, dt]]
    else:
        raise ValueError(f"dims={dims}: must be 1, 2 or 4")
    A, B = np.array(A, float), np.array(B, float)
    return EnvParams(A=A, B=B, Q=np.eye(dims), R=np.eye(B.shape[1]), noise=0.1 * np.eye(dims))


def start(params, key):
    """A point `[n]` of the cube [-1, 1]^n."""
    return random.uniform(key, params.A.shape[:1], minval=-1, maxval=1)


def advance(params, s, a, key):
    """One step from `s [n]` with `a [m]`: `(next s, cost)`, the cost being that of `s` and `a`."""
    cost = s @ params.Q @ s + a @ params.R @ a
    return params.A @ s + params.B @ a + params.noise @ random.normal(key, s.shape), cost


class LQR(environment.Environment[EnvState, EnvParams]):
    """A fully observed linear-quadratic system that starts in [-1, 1]^n and is truncated at a time limit."""

    _supports_transition_gradients = True

    def __init__(self, params=None):
        super().__init__()
        self.params = system(2) if params is None else params

    @property
    def default_params(self):
        """The system of this environment."""
        return jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, self.params)

    def reset_env(self, key, params):
        """Start at a point of the cube [-1, 1]^n."""
        position = start(params, key)
        return position, EnvState(position=position, time=0)

    def step_env(self, key, state, action, params):
        """Reward of the current state and action, then one step of the dynamics."""
        s, cost = advance(params, state.position, jnp.clip(action, -ACTION_BOUND, ACTION_BOUND), key)
        s, state = self._apply_transition_gradient_policy(s, EnvState(position=s, time=state.time + 1))
        return s, state, -cost, jnp.array(False), {}

    def action_space(self, params):
        """A box wide enough never to clip the optimal policy."""
        return spaces.Box(-ACTION_BOUND, ACTION_BOUND, params.B.shape[1:])

    def observation_space(self, params):
        """All of the state space."""
        return spaces.Box(-jnp.inf, jnp.inf, params.A.shape[:1])


for env_id, dims in ENVS.items():
    if env_id not in gymnax.registered_envs:
        gymnax.register(env_id, lambda dims=dims: LQR(system(dims)))


class Solution(NamedTuple):
    """The optimal value of a state is `-(s^T P s) + offset`; the optimal policy is a = -K s, or N(-K s, covariance)."""

    P: np.ndarray  # [n, n]
    K: np.ndarray  # [m, n]
    covariance: np.ndarray  # [m, m], zero without entropy
    offset: float


def solve(params, gamma, alpha=0.0):
    """The optimal policy for discount `gamma` and entropy temperature `alpha >= 0`, in float64.

    With M = R + gamma B^T P B, the gain is K = gamma M^-1 B^T P A and P the fixed point of the discounted Riccati map
    P <- Q + gamma A^T P (A - B K); the soft-optimal policy is Gaussian, its covariance (alpha / 2) M^-1. RuntimeError
    if the map does not converge: the system cannot be stabilized.
    """
    A, B, Q, R, noise = (np.asarray(x, np.float64) for x in (params.A, params.B, params.Q, params.R, params.noise))
    P = Q
    for _ in range(100_000):
        M = R + gamma * B.T @ P @ B
        K = gamma * np.linalg.solve(M, B.T @ P @ A)
        P, old = Q + gamma * A.T @ P @ (A - B @ K), P
        change = np.abs(P - old).max() / np.abs(P).max()
        if change <= 1e-13 or np.isnan(change):
            break
    if not change <= 1e-13:
        raise RuntimeError("the Riccati map does not converge")
    covariance = alpha / 2 * np.linalg.inv(M)
    # a Boltzmann policy's soft value exceeds its mode's by alpha log of the integral of exp(-x^T M x / alpha)
    width = alpha / 2 * (len(M) * np.log(np.pi * alpha) - np.linalg.slogdet(M)[1]) if alpha else 0.0
    return Solution(P, K, covariance, (width - gamma * np.trace(P @ noise @ noise.T)) / (1 - gamma))


def simulate(params, policy, gamma, key, num_episodes=512, num_steps=300):
    """Discounted costs `[num_episodes]` of `policy(s [n]) -> a [m]`, actions unbounded, from initial states of `LQR`.

    The same key gives the same initial states and noise for every policy. Costs after `num_steps` are omitted.
    """

    def step(carry, key):
        s, total, discount = carry
        s, cost = advance(params, s, policy(s), key)
        return (s, total + discount * cost, discount * gamma), None

    def episode(key):
        key_start, key_noise = random.split(key)
        return lax.scan(step, (start(params, key_start), 0.0, 1.0), random.split(key_noise, num_steps))[0][1]

    return jax.vmap(episode)(random.split(key, num_episodes))
