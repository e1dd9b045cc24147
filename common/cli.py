"""Command line: every field of a `Config` as a flag, and one line on stderr for every mistake."""

import contextlib
import dataclasses
import difflib
import importlib
import io
import math
import os
import re
import sys
from pathlib import Path
from typing import Literal, NoReturn

import gymnax
import jax
import numpy as np
import tyro

import common.lqr  # noqa: F401, registers its environments

INT_MAX = 2**31 - 1  # steps and seeds are counted in int32
# named here, not found by trying: gymnax makes some environments only after a download
CONTINUOUS_ENVS = ("Pendulum-v1", "MountainCarContinuous-v0", "PointRobot-misc", "Reacher-misc", "Swimmer-misc")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which seeds to run, and where the results go."""

    seed: int = 0  # the first seed, 0 or more
    num_seeds: int = 1  # seeds run side by side; seed i is bitwise the run of that seed alone
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=VALUE,VALUE,... may be repeated: runs the whole grid
    name: str = "default"  # folder of this run, inside <out>/<algorithm>/<env>/
    out: Path = Path("results/runs")  # folder of all results
    resume: bool = False  # continue a killed or interrupted run of the same command
    no_plot: bool = False  # draw no curve.png
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # send the metrics there as well, to one or both
    distributed: bool = False  # one of several processes that share the runs, found as Slurm or the like tells JAX
    coordinator_address: str = ""  # host:port of process 0, where JAX does not detect it
    num_processes: int = 0  # where JAX does not detect it
    process_id: int = -1  # of this process, from 0, where JAX does not detect it


def fail(message) -> NoReturn:
    """Report a mistake of the user's in one line on stderr and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def parse(function, prog=None, description=None):
    """`tyro.cli`, with its boxed error messages folded into one line; the exit code of an error is 2."""
    caught = io.StringIO()
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(function, prog=prog, description=description, config=markers)
    except SystemExit as error:
        if not error.code:
            raise
    lines = [line.strip("│ ") for line in caught.getvalue().splitlines()[1:]]
    said = " ".join(lines[: next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))])
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    fail(f"{said}{f' (perhaps you meant {meant[1]})' if meant else ''}; --help lists all flags")


def parse_run(config_class, script):
    """Read `(Config, Options)` from the command line and check each value by itself."""

    def read(hyperparameter: config_class, run: Options):
        return hyperparameter, run

    summary = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n")[0]
    config, options = parse(read, prog=script, description=summary)
    for field in dataclasses.fields(config):
        check_value(field.name, getattr(config, field.name))
    check_value("num_seeds", options.num_seeds)
    if not 0 <= options.seed <= INT_MAX - options.num_seeds:
        fail(f"--seed {options.seed}: must be from 0 to {INT_MAX - options.num_seeds}")
    if not re.fullmatch(r"\w[\w.+=-]*", options.name):
        fail(f"--name {options.name!r}: must be a plain folder name of letters, digits and . _ + = -")
    check_distributed(options)
    register_env(config.env)
    return config, options


def check_distributed(options):
    """Fail on flags of `--distributed` that make no sense together."""
    address, number, index = options.coordinator_address, options.num_processes, options.process_id
    if not options.distributed and (address, number, index) != ("", 0, -1):
        fail("--coordinator-address, --num-processes and --process-id go with --distributed")
    if address and not re.fullmatch(r"\S+:\d+", address):
        fail(f"--coordinator-address {address}: must be host:port")
    if number < 0:
        fail(f"--num-processes {number}: must be 1 or more")
    if index < -1 or (number and index >= number):
        fail(f"--process-id {index}: must be from 0 to {number - 1}, with --num-processes {number}")


def check_value(name, value):
    """Fail unless the value of field `name` is possible; the rule follows from its type and its name."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, tuple):
        for item in value:
            check_value(name, item)
    elif isinstance(value, int) and not isinstance(value, bool):
        least = 0 if name == "window" else 1
        if not least <= value <= INT_MAX:
            fail(f"{flag} {value}: must be a whole number from {least} to {INT_MAX}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            fail(f"{flag} {value}: must be a finite number")
        if name in ("gamma", "tau", "gae_lambda") and not 0 <= value <= 1:
            fail(f"{flag} {value}: must be in [0, 1]")
        if ("noise" in name or name in ("ou_theta", "ou_sigma", "ridge", "tolerance")) and value < 0:
            fail(f"{flag} {value}: must be 0 or more")
        if name == "exploration_range" and not 0 < value <= 1:
            fail(f"{flag} {value}: must be more than 0 and at most 1")
        positive = ("alpha", "initial_alpha", "beta", "ou_dt", "initial_std", "max_grad_norm")
        if ("learning_rate" in name or name in positive) and value <= 0:
            fail(f"{flag} {value}: must be more than 0")


def register_env(name):
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
        fail(f"--env {name}: no such gymnax environment; nearest: {nearest}; or your own as module:factory")
    try:
        env, env_params = gymnax.make(name)
        env.action_space(env_params)
    except Exception as error:
        fail(f"--env {name}: cannot be made: {type(error).__name__}: {error}")


def has_box_actions(name):
    """Whether the environment's actions are a Box with finite bounds."""
    env, env_params = gymnax.make(name)
    space = env.action_space(env_params)
    return hasattr(space, "low") and bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())


def check_shapes(config, init):
    """Trace `init`, which knows which sizes go together, and fail on what it refuses or what memory cannot hold."""
    try:
        state = jax.eval_shape(init, config, jax.random.key(0))
    except ValueError as error:
        named = re.match(r"(\w+)=(\S+): (.*)", str(error), re.DOTALL)
        others = f"; some that fit: {', '.join(CONTINUOUS_ENVS)}" if named and named[1] == "env" else ""
        fail(f"--{named[1].replace('_', '-')} {named[2]}: {named[3]}{others}" if named else error)
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    if "SC_PHYS_PAGES" in os.sysconf_names and jax.default_backend() == "cpu":
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            flag = f"--buffer-size {config.buffer_size}: " if hasattr(config, "buffer_size") else ""
            fail(f"{flag}a seed needs {needed / 2**30:.1f} GiB; this machine has {present / 2**30:.1f} GiB")
