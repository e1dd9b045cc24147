"""Physics engines as gymnax environments: what the tasks of MuJoCo Playground and Brax share.

A task of either has `reset(key) -> state` and `step(state, action) -> state`; a state has `obs`, `reward`, `done`, and
the dictionaries `metrics` and `info`. Their own wrappers for episodes are not used, since they hide time limits.

A reset of a physics engine costs as much as many steps, and gymnax resets at every step. So 256 start states are made
once, by one vmapped reset with a fixed key: `reset` draws from the first half and the resets within `step` from the
second. Evaluation thus begins its episodes in other states than training, but for the first episode of each training
environment.
"""

import ctypes.util
import functools
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces
from jax import lax, random

from amortax.common import devices

NUM_STARTS = 256  # start states, half for `reset`, half for `step`
# the reset runs once, and to compile it takes longest; level 0 compiles in half the time, but would take twice the time
# for the 200 steps of the physics that the reset of CheetahRun makes
COMPILE_FAST = {
    "xla_backend_optimization_level": 1,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@struct.dataclass(kw_only=True)
class EnvState(environment.EnvState):
    """What the next step reads of the task's state, and the time in steps of the task."""

    leaves: Any  # list of arrays
    time: int


@struct.dataclass
class EnvParams(environment.EnvParams):
    """The time limit, in steps of the task, and how many of these a step of the environment makes."""

    max_steps_in_episode: int = 1000
    action_repeat: int = struct.field(pytree_node=False, default=1)


def load(extra, *modules):
    """Import the modules of an extra; ImportError with one line where it is not installed, or broken."""
    if sys.platform == "linux" and "MUJOCO_GL" not in os.environ:  # MuJoCo reads it when it is imported
        for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):  # they draw without a screen
            if ctypes.util.find_library(library):
                os.environ["MUJOCO_GL"] = name
                break
    try:
        return [importlib.import_module(module) for module in modules]
    except ModuleNotFoundError as error:
        if error.name not in ("mujoco_playground", "brax"):
            raise ImportError(f"{error}; {reinstall(extra)}") from error
        raise ImportError(f'needs the extra {extra}: pip install -e ".[{extra}]"') from error
    except Exception as error:
        raise ImportError(f"{type(error).__name__}: {error}; {reinstall(extra)}") from error


def reinstall(extra):
    """What to do where packages do not fit together: an upgrade to mujoco 4 deletes files that it needs."""
    packages = f"mujoco mujoco-core mujoco-studio mujoco-mjx {extra}"
    return f"repair with pip uninstall -y mujoco && pip install --force-reinstall --no-deps {packages}"


class Physics(environment.Environment[EnvState, EnvParams]):
    """A task of a physics engine; a step that gives NaN ends the episode, with the last observation and reward 0.

    `low` and `high` `[n]` bound the actions. A subclass may override `pack` and `unpack`, so that only what the next
    step reads is kept.
    """

    def __init__(self, task, low, high, differentiable=False, action_repeat=1):
        super().__init__()
        self.task, self.low, self.high = task, np.array(low, np.float32), np.array(high, np.float32)
        self._supports_transition_gradients, self.action_repeat = differentiable, action_repeat

    @property
    def default_params(self):
        """1,000 steps of the task."""
        return EnvParams(action_repeat=self.action_repeat)

    def pack(self, state):
        """The task's state as a pytree of what is kept of it."""
        return state

    def unpack(self, packed):
        """The inverse of `pack`."""
        return packed

    @functools.cached_property
    def starts(self):
        """All start states as `(list of arrays [NUM_STARTS, ...], structure and types of one)`.

        They are NumPy arrays, so that they outlive a change of JAX's backend.
        """

        def start(key):
            state = self.task.reset(key)
            return self.pack(state.replace(info={k: v for k, v in state.info.items() if k != "rng"}))

        def make():
            options = devices.known_options(COMPILE_FAST) if jax.default_backend() == "cpu" else None
            made = jax.jit(jax.vmap(start), compiler_options=options)(random.split(random.key(0), NUM_STARTS))
            return jax.device_get(made)

        # in a thread of its own no transformation surrounds it; with jax.ensure_compile_time_eval() each operation on
        # constants would be compiled by itself, which takes most of the time
        with ThreadPoolExecutor(1) as thread:
            made = thread.submit(make).result()
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), made)
        return not_empty(made), like

    def start(self, key, half):
        """A start state of one half: `(obs, EnvState)`."""
        i = random.randint(key, (), half * NUM_STARTS // 2, (half + 1) * NUM_STARTS // 2)
        leaves = [jnp.asarray(x)[i] for x in self.starts[0]]
        time = jnp.int32(0)  # of the type that it has in compiled programs, so that a step is traced once
        return self.restored(leaves, key).obs, EnvState(leaves=leaves, time=time)

    def restored(self, leaves, key):
        """The task's state from those of its arrays that are not empty."""
        like, structure = jax.tree.flatten(self.starts[1])
        given = iter(leaves)
        all_leaves = [next(given) if np.prod(x.shape) else jnp.zeros(x.shape, x.dtype) for x in like]
        state = self.unpack(jax.tree.unflatten(structure, all_leaves))
        return state.replace(info={**state.info, "rng": key}, metrics=dict(state.metrics))  # a step may write into them

    @functools.partial(jax.jit, static_argnames="self")
    def reset(self, key, params=None):
        """One of the first half of the start states."""
        return self.start(key, 0)

    def reset_env(self, key, params):
        """One of the second half of the start states, for the resets within `step`."""
        return self.start(key, 1)

    def step_task(self, leaves, action, key):
        """One step of the task: `(leaves, obs, reward, ended)`."""
        before = self.restored(leaves, key)
        after = jax.tree.map(jnp.asarray, self.task.step(before, action))  # Brax's metrics can be Python numbers
        after = after.replace(info={k: v for k, v in after.info.items() if k != "rng"})
        ended, arrays = after.done.astype(bool), jax.tree.leaves(self.pack(after))
        broken = jnp.stack([jnp.isnan(x).any() for x in arrays]).any() | ~jnp.isfinite(after.obs).all()
        after = after.replace(obs=jnp.where(broken, before.obs, after.obs), reward=jnp.where(broken, 0.0, after.reward))
        new = [x.astype(old.dtype) for x, old in zip(not_empty(self.pack(after)), leaves, strict=True)]
        return new, after.obs, after.reward, ended | broken

    def step_env(self, key, state, action, params):
        """`action_repeat` steps of the task, or fewer where the episode ends, and the sum of their rewards."""
        action = jnp.clip(action, self.low, self.high)

        def repeat(carry, key):
            leaves, _, total, ended = carry
            new, new_obs, reward, new_ended = self.step_task(leaves, action, key)
            after = new, new_obs, total + reward, new_ended
            return jax.tree.map(lambda x, y: jnp.where(ended, x, y), carry, after), None

        keys = random.split(key, params.action_repeat)
        if params.action_repeat == 1:
            leaves, obs, reward, ended = self.step_task(state.leaves, action, keys[0])
        else:
            begin = state.leaves, self.restored(state.leaves, key).obs, jnp.zeros(()), jnp.array(False)
            (leaves, obs, reward, ended), _ = lax.scan(repeat, begin, keys)
        state = EnvState(leaves=leaves, time=state.time + params.action_repeat)
        obs, state = self._apply_transition_gradient_policy(obs, state)
        return obs, state, reward, ended, {}

    def action_space(self, params):
        """The range of the task's actuators."""
        return spaces.Box(self.low, self.high, self.low.shape)

    def observation_space(self, params):
        """All of R^n."""
        return spaces.Box(-jnp.inf, jnp.inf, self.starts[1].obs.shape)


def not_empty(tree):
    """The leaves that are not empty."""
    return [x for x in jax.tree.leaves(tree) if np.prod(x.shape)]
