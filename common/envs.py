"""Environments by name: gymnax's, the LQR systems, physics, one's own as `module:factory`, Gymnasium's counterparts."""

import difflib
import importlib
import os
import sys

import gymnax
import numpy as np

from amortax.common import brax, lqr, playground  # they register their environments
from amortax.common.cli import fail

# named here, not found by trying: gymnax makes some environments only after a download
CONTINUOUS_ENVS = ("Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc")


def show_all():
    """Print the names of all environments that fit, and which extra those of a physics engine need."""
    for title, names in (
        ("gymnax", CONTINUOUS_ENVS),
        ("linear-quadratic regulation", lqr.ENVS),
        ('MuJoCo Playground, with pip install -e ".[playground]"', playground.ENVS),
        (f'Brax, with pip install -e ".[brax]"; -{", -".join(brax.BACKENDS[1:])} for another backend', brax.ENVS),
    ):
        print(f"{title}:", *names, sep="\n  ")
    print("your own:", "module:factory, a callable that returns a gymnax Environment", sep="\n  ")


def register(name):
    """Make `gymnax.make(name)` work for `module:factory`; fail where the environment is unknown or cannot be made."""
    if ":" in name and name not in gymnax.registered_envs:
        module, _, factory = name.partition(":")
        sys.path.insert(0, os.getcwd())
        try:
            gymnax.register(name, getattr(importlib.import_module(module), factory))
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            fail(f"--env {name}: {error}; must be module:factory, a callable that returns a gymnax Environment")
    if name not in gymnax.registered_envs:
        lower = {known.lower(): known for known in gymnax.registered_envs}
        near = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.4)]
        nearest = ", ".join(near or CONTINUOUS_ENVS)
        hint = "--list-envs lists all; or your own as module:factory"
        fail(f"--env {name}: no such gymnax environment; nearest: {nearest}; {hint}")
    try:
        env, env_params = gymnax.make(name)
        env.action_space(env_params)
    except ImportError as error:
        fail(f"--env {name}: {error}")
    except Exception as error:
        fail(f"--env {name}: cannot be made: {type(error).__name__}: {error}")


def has_box_actions(name):
    """Whether the environment's actions are a Box with finite bounds."""
    env, env_params = gymnax.make(name)
    space = env.action_space(env_params)
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
    env = gymnasium.make(name, render_mode=render_mode, disable_env_checker=True)
    other, other_params = gymnax.make(name)
    for kind in ("observation_space", "action_space"):
        ours, theirs = getattr(other, kind)(other_params).shape, getattr(env, kind).shape
        if ours != theirs:
            what = kind.replace("_space", "s")
            fail(f"--backend gymnasium: {name} has {what} of shape {theirs} there, {ours} in gymnax")
    return env
