"""Environments by name: gymnax's, the LQR systems, physics, one's own as `module:factory`, Gymnasium's counterparts."""

import difflib
import functools
import importlib
import os
import sys
from importlib import metadata

import gymnax
import numpy as np
from gymnax import registration

from amortax.common import brax, contract, env_params, lqr, playground, user_code  # some register their environments
from amortax.common.cli import fail

# named here, not found by trying: gymnax makes some environments only after a download
CONTINUOUS_ENVS = ("Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc")
DISCRETE_ENVS = ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Breakout-MinAtar", "SpaceInvaders-MinAtar")


def show_all():
    """Print the names of all environments that fit, and which extra those of a physics engine need."""
    for title, names in (
        ("gymnax", CONTINUOUS_ENVS),
        ("gymnax, Discrete actions", DISCRETE_ENVS),
        ("linear-quadratic regulation", lqr.ENVS),
        ('MuJoCo Playground, with pip install -e ".[playground]"', playground.ENVS),
        (f'Brax, with pip install -e ".[brax]"; -{", -".join(brax.BACKENDS[1:])} for another backend', brax.ENVS),
    ):
        print(f"{title}:", *names, sep="\n  ")
    print("your own:", "module:factory, a callable that returns a gymnax Environment", sep="\n  ")


def register(name, changes=(), show_traceback=False):
    """Let `gymnax.make(name)` give one environment, checked, whose parameters are changed by words `NAME=VALUE`.

    Fails where it is unknown, cannot be made or breaks the contract. Its factory is called once in a process.
    """
    if ":" in name and name not in gymnax.registered_envs:
        import_factory(name, show_traceback)
    if name not in gymnax.registered_envs:
        lower = {known.lower(): known for known in gymnax.registered_envs}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
        nearest = ", ".join(near or CONTINUOUS_ENVS)
        hint = "--list-envs lists all; or your own as module:factory"
        fail(f"--env {name}: no such gymnax environment; nearest: {nearest}; {hint}")
    try:
        env = make_once(name)
    except Exception as error:  # a user's code can be wrong in any way
        if isinstance(error, ImportError) and "/" in name:  # the extra of a physics engine
            fail(f"--env {name}: {error}")
        user_code.fail(name, error, show_traceback, "cannot be made: ")
    if changes:
        env = env_params.change(name, env, changes)
    if changes or type(env).__module__.split(".")[0] not in ("gymnax", "amortax"):
        contract.check(name, env, env.default_params, show_traceback)
    registration._registry[name] = lambda: env  # gymnax has no way to register a name anew


def import_factory(name, show_traceback):
    """Register `module:factory` with gymnax."""
    module, _, factory = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        gymnax.register(name, getattr(importlib.import_module(module), factory))
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if not missing and user_code.place(user_code.frames(error)):
            user_code.fail(name, error, show_traceback)
        fail(f"--env {name}: {error}; must be module:factory, a callable that returns a gymnax Environment")


@functools.cache
def make_once(name):
    """The environment `name` with its own parameters."""
    return gymnax.make(name)[0]


def describe(name):
    """What `config.json` holds of an environment: changed parameters, and hash and version of code not gymnax's."""
    if name not in gymnax.registered_envs:
        return {}
    env = gymnax.make(name)[0]
    changed, files = getattr(env, "changed_params", {}), files_of(name)
    described = {"env_params": changed} if changed else {}
    return described | ({"env_sha256": user_code.sha256(files)} if files else {})


def package(name):
    """The installed package of an environment that is not gymnax's, by the name of its module; None for others."""
    module = type(gymnax.make(name)[0]).__module__.split(".")[0] if name in gymnax.registered_envs else ""
    try:
        return metadata.distribution(module).name if module else None
    except metadata.PackageNotFoundError:
        return None


def files_of(name):
    """The files of the code of an environment: see `user_code.files`."""
    return user_code.files(name.partition(":")[0] if ":" in name else "", gymnax.make(name)[0])


def explain(name, error, show_traceback=False):
    """An exception in one line, if it comes from inside the environment `name`; else None.

    Its traceback is printed before if that is asked for.
    """
    known = name in gymnax.registered_envs
    line = user_code.explain(files_of(name), error, show_traceback) if known else None
    return f"--env {name}: {line}" if line else None


def has_box_actions(name):
    """Whether the environment's actions are a Box with finite bounds."""
    env, params = gymnax.make(name)
    space = env.action_space(params)
    return hasattr(space, "low") and bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def make_gymnasium(name, render_mode=None):
    """Gymnasium's environment of the same name; fails where there is none, or a different one."""
    import gymnasium

    if name not in gymnasium.registry:
        known = [x for x in gymnax.registered_envs if x in gymnasium.registry and has_box_actions(x)]
        fail(f"--backend gymnasium: it has no {name}; environments in both: {', '.join(known)}")
    # pygame draws: without a window, a sound device or a greeting on stdout
    for variable in ("SDL_VIDEODRIVER", "SDL_AUDIODRIVER", "PYGAME_HIDE_SUPPORT_PROMPT"):
        os.environ.setdefault(variable, "dummy")
    other, other_params = gymnax.make(name)
    changed = getattr(other, "changed_params", {})
    if set(changed) - {"max_steps_in_episode"}:
        fail(f"--backend gymnasium: it has no parameters such as this run's {', '.join(changed)}")
    options = {"max_episode_steps": changed["max_steps_in_episode"]} if changed else {}
    env = gymnasium.make(name, render_mode=render_mode, disable_env_checker=True, **options)
    for kind in ("observation_space", "action_space"):
        ours, theirs = getattr(other, kind)(other_params).shape, getattr(env, kind).shape
        if ours != theirs:
            what = kind.replace("_space", "s")
            fail(f"--backend gymnasium: {name} has {what} of shape {theirs} there, {ours} in gymnax")
    return env
