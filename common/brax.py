"""Brax's environments as gymnax environments, such as `brax/halfcheetah`.

Importing this module registers them; the extra `brax` is needed to make one. Brax's default is the generalized backend;
`brax/halfcheetah-spring`, `-positional` and `-mjx` have another. Episodes are truncated after 1,000 steps.

Source: Freeman et al., "Brax - A Differentiable Physics Engine" (NeurIPS 2021, datasets and benchmarks).
"""

import functools

import gymnax
import jax
import numpy as np

from amortax.common import physics

TASKS = (
    *("ant", "halfcheetah", "hopper", "humanoid", "humanoidstandup", "inverted_pendulum", "inverted_double_pendulum"),
    *("pusher", "reacher", "walker2d"),  # not swimmer, which calls jnp.clip with an argument that JAX has removed
)
BACKENDS = ("generalized", "spring", "positional", "mjx")
ENVS = tuple(f"brax/{task}" for task in TASKS)


class Brax(physics.Physics):
    """A task of Brax."""

    def __init__(self, task, low, high, **options):
        super().__init__(task, low, high, **options)
        self.model, self.seconds = task.sys.mj_model, float(task.dt)

    def pose(self, state):
        """What MuJoCo draws."""
        return {"qpos": state.pipeline_state.q, "qvel": state.pipeline_state.qd}


@functools.cache
def make(task, backend=BACKENDS[0], action_repeat=1):
    """The task as a gymnax environment, the same object each time, so that it is traced once."""
    _, envs = physics.load("brax", "brax", "brax.envs")
    with jax.ensure_compile_time_eval():
        loaded = envs.get_environment(task, backend=backend)
        bound = np.ones(loaded.action_size)
        return Brax(loaded, -bound, bound, differentiable=backend != "mjx", action_repeat=action_repeat)


for task in TASKS:
    for env_id, backend in (f"brax/{task}", BACKENDS[0]), *((f"brax/{task}-{x}", x) for x in BACKENDS[1:]):
        if env_id not in gymnax.registered_envs:
            gymnax.register(env_id, functools.partial(make, task, backend))
