"""What an environment must return, checked before anything is compiled: gymnax's contract, as the algorithms use it.

    reset(key, params) -> (obs, state)
    step(key, state, action, params) -> (obs, state, reward, terminated, truncated, info)

The first mistake ends the command with one line. An exception from inside an environment gets one line as well, with
the file and the line of the user's code.
"""

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from gymnax.environments.environment import Environment
from jax.interpreters import partial_eval

from amortax.common import cli, user_code

BOUND = 1e38  # of actions: the difference of two of them must not overflow
ONE_ARRAY = "expected one array: return jax.flatten_util.ravel_pytree(obs)[0] instead, in the environment or a wrapper"


def check(name, env, params, show_traceback=False):
    """Fail at the first mistake in an environment; warn where its episodes may not be what the user means."""
    try:
        mistake = next(itertools.chain(mistakes(env, params), mistakes_of_a_step(name, env, params)), None)
    except Exception as error:  # a user's code can be wrong in any way
        user_code.fail(name, error, show_traceback)
    if mistake:
        cli.fail(f"--env {name}: {mistake}")


def mistakes(env, params):
    """Yield what an environment returns that breaks the contract, each after those that it takes to be absent."""
    space = env.action_space(params)
    yield from space_mistakes(space)
    limit = getattr(params, "max_steps_in_episode", 1)
    if not (np.ndim(limit) == 0 and isinstance(limit, int | float | np.number | jax.Array) and 1 <= limit < 2**31):
        yield f"max_steps_in_episode is {limit!r}, expected a number from 1 to 2147483647"
    key, action = jax.random.key(0), example_action(space)
    first = outputs(lambda key: env.reset(key, params), key)
    yield from count_mistakes("reset", first, "obs, state")
    yield from obs_mistakes(first[0], observation_space(env, params))
    for path, leaf in leaves(first[1]).items():
        if not is_array(leaf):
            yield f"reset returned a state whose {path or 'value'} is {text(leaf)}, expected arrays alone"
    # gymnax's step joins step_env and reset_env, and fails in its own code where they do not fit
    if getattr(type(env), "step", None) is Environment.step:
        results = outputs(lambda key, state, action: env.step_env(key, state, action, params), key, first[1], action)
        yield from count_mistakes("step_env", results, "obs, state, reward, terminated, info")
        yield from step_mistakes("step_env", first, *results[:4], info=results[4])
        truncated = outputs(lambda state: env.is_truncated(state, params), first[1])
        yield from flag_mistakes("is_truncated", "a value", truncated)
    results = outputs(lambda key, state, action: env.step(key, state, action, params), key, first[1], action)
    yield from count_mistakes("step", results, "obs, state, reward, terminated, truncated, info")
    yield from step_mistakes("step", first, *results[:4], info=results[5])
    yield from flag_mistakes("step", "truncated", results[4])
    final = results[5].get("final_observation")
    if not is_array(final) or final.shape != first[0].shape:
        found = text(final) if "final_observation" in results[5] else "an info without it"
        expected = f"{text(first[0])}, the observation before a reset"
        yield f'step returned {found} for info["final_observation"], expected {expected}'


def space_mistakes(space):
    """Yield the mistakes in a space of actions, but for bounds that are infinite: algorithms say what fits them."""
    if hasattr(space, "n"):
        if space.n < 1:
            yield f"action_space returned Discrete({space.n}), expected at least one action"
        return
    if not all(hasattr(space, name) for name in ("low", "high", "shape", "dtype")):
        yield f"action_space returned {space!r:.100}, expected a Box or Discrete"
    if not jnp.issubdtype(space.dtype, jnp.floating):
        yield f"action_space returned a Box of {np.dtype(space.dtype)}, expected floats; whole numbers are Discrete"
    try:
        low, high = (np.broadcast_to(np.asarray(x, float), space.shape) for x in (space.low, space.high))
    except ValueError as error:
        yield f"action_space returned a Box whose bounds do not have its shape: {error}"
    if not math.prod(space.shape):
        yield f"action_space returned a Box of shape {space.shape}, expected at least one number"
    if not (low < high).all():
        yield "action_space returned a Box, expected low < high everywhere"
    finite = np.isfinite([low, high])
    if finite.all() and max(np.abs(low).max(), np.abs(high).max()) >= BOUND:
        yield f"action_space returned bounds {low.min():g} and {high.max():g}, expected floats below {BOUND:g}"


def example_action(space):
    """The shape and type of an action as an algorithm gives it."""
    return jax.ShapeDtypeStruct(*(((), jnp.int32) if hasattr(space, "n") else (space.shape, jnp.float32)))


def observation_space(env, params):
    """The space of observations; None where an environment does not say, which only Discrete ones have to."""
    try:
        return env.observation_space(params)
    except Exception:
        return None


def obs_mistakes(obs, space):
    """Yield the mistakes in an observation from reset."""
    returned, n = f"reset returned {text(obs)} for an observation", getattr(space, "n", None)
    if not is_array(obs):
        yield f"{returned}, {ONE_ARRAY}"
    kind = np.dtype(obs.dtype).kind if isinstance(obs.dtype, np.dtype) else ""
    if kind not in "biuf" and not jnp.issubdtype(obs.dtype, jnp.floating):
        yield f"{returned}, expected floats, integers or booleans"
    if not obs.size:
        yield f"{returned}, expected at least one number"
    is_code = obs.shape == () and jnp.issubdtype(obs.dtype, jnp.integer)
    if is_code and n is None:
        yield f"{returned}, expected a Discrete observation_space for it, or a float"
    if n is not None and not is_code:
        yield f"{returned}, expected an integer, because observation_space is Discrete({n})"


def count_mistakes(where, results, names):
    """Yield a mistake unless there are as many results as `names`, in a tuple."""
    expected = f"{len(names.split(', '))} values: {names}"
    if not isinstance(results, tuple | list):
        yield f"{where} returned {text(results)}, expected {expected}"
    if len(results) != len(names.split(", ")):
        yield f"{where} returned {len(results)} values, expected {expected}"


def step_mistakes(where, first, obs, state, reward, terminated, info):
    """Yield the mistakes in the results of a step; `first` is what reset returned."""
    if not is_array(obs) or (obs.shape, obs.dtype) != (first[0].shape, first[0].dtype):
        yield f"{where} returned {text(obs)} for an observation, expected {text(first[0])}, as from reset"
    before, after = leaves(first[1]), leaves(state)
    for path in [*before, *(path for path in after if path not in before)]:
        old, new = (text(x[path]) if path in x else "absent" for x in (before, after))
        if old != new:
            yield f"{where} returned a state whose {path or 'value'} is {new}, expected {old}, as from reset"
    if jax.tree.structure(first[1]) != jax.tree.structure(state):
        yield f"{where} returned {text(state)} for a state, expected {text(first[1])}, as from reset"
    if not is_array(reward) or reward.shape or not isinstance(reward.dtype, np.dtype) or reward.dtype.kind == "c":
        yield f"{where} returned {text(reward)} for a reward, expected a scalar, float32[]"
    yield from flag_mistakes(where, "terminated", terminated)
    if not isinstance(info, dict):
        yield f"{where} returned {text(info)} for info, expected a dict"


def flag_mistakes(where, what, value):
    """Yield a mistake unless `value` is a boolean scalar."""
    if not is_array(value) or value.shape or value.dtype != bool:
        yield f"{where} returned {text(value)} for {what}, expected a boolean scalar, bool[]"


def mistakes_of_a_step(name, env, params):
    """Take one step: yield what is not finite in it; warn about observations that differ, and of no time limit."""
    space = env.action_space(params)
    like = example_action(space)
    inside = 0.25 * space.low + 0.75 * space.high if jnp.issubdtype(like.dtype, jnp.floating) else 0

    def act(key):
        obs, state = env.reset(key, params)
        action = jnp.full(like.shape, jnp.where(jnp.isfinite(inside), inside, 0), like.dtype)
        new_obs, _, reward, terminated, truncated, info = env.step(key, state, action, params)
        return obs, new_obs, info["final_observation"], reward, terminated, truncated

    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    results = jax.jit(act, compiler_options=options)(jax.random.key(0))
    obs, new_obs, final, reward, terminated, truncated = (np.asarray(x, np.float32) for x in results)
    if not np.isfinite(obs).all():
        yield "reset returned an observation that is not finite"
    if not terminated and not (np.isfinite(new_obs).all() and np.isfinite(reward)):
        yield f"step returned {'a reward' if np.isfinite(new_obs).all() else 'an observation'} that is not finite"
    if not terminated and not truncated and not np.allclose(new_obs, final, rtol=1e-4, atol=1e-6):
        changed = "the observation and not its copy, or the copy alone"
        warn(
            f'{name}: info["final_observation"] is not the observation in mid-episode: does a wrapper change {changed}?'
        )
    if not has_time_limit(env, params):
        warn(f"{name} has no time limit: an episode of an evaluation ends after {max_steps(params):,} steps")


def has_time_limit(env, params):
    """Whether `truncated` is more than a constant."""
    _, state = outputs(lambda key: env.reset(key, params), jax.random.key(0))
    truncated = lambda key, state, action: env.step(key, state, action, params)[4]
    program = jax.make_jaxpr(truncated)(jax.random.key(0), state, example_action(env.action_space(params)))
    return any(partial_eval.dce_jaxpr(program.jaxpr, [True])[1])


def max_steps(params):
    """The bound of the algorithm files for episodes of an evaluation."""
    return max(10_000, getattr(params, "max_steps_in_episode", 0))


def warn(message):
    """Show a warning about an environment in one line."""
    warnings.warn(message, stacklevel=2)


# Values without computing them


def outputs(function, *args):
    """What `function(*args)` returns, with arrays as their shapes and types; nothing is computed."""
    seen = []
    jax.eval_shape(lambda *args: seen.append(function(*args)), *args)
    return jax.tree.map(as_struct, seen[-1])


def as_struct(x):
    """The shape and type of an array or number; anything else as it is."""
    if isinstance(x, bool | int | float | complex | np.generic | np.ndarray | jax.Array):
        return jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x))
    return x


def is_array(x):
    """Whether `x` is the shape and type of an array."""
    return isinstance(x, jax.ShapeDtypeStruct)


def leaves(tree):
    """The leaves of a tree by their places, such as `.position`."""
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def text(x):
    """A value from `outputs` in words."""
    if is_array(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, dict):
        return f"a dict of {', '.join(map(str, x))}"
    if isinstance(x, tuple | list) and not hasattr(x, "_fields"):
        return f"a {type(x).__name__} of {len(x)} values"
    return str(x) if x is None or isinstance(x, str) else f"a {type(x).__name__}"
