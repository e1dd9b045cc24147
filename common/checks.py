"""Checks before a command writes anything; each mistake ends it with one line."""

import math
import os

import jax

from amortax.common import cli, distributed, envs, record, sweep


def check_config(config, function):
    """Trace `function(config, key)`, such as `init`; fail on what it refuses or what memory cannot hold.

    The configuration is concrete while it is traced, so that its values can be checked.
    """
    try:
        result = jax.eval_shape(lambda key: function(config, key), jax.random.key(0))
    except ValueError as error:
        about_env, fitting = str(error).startswith("env="), envs.CONTINUOUS_ENVS
        if "in a Box" not in str(error):
            fitting = envs.DISCRETE_ENVS
        cli.fail_field(config, error, f"; some that fit: {', '.join(fitting)}" if about_env else "")
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(result))
    if "SC_PHYS_PAGES" in os.sysconf_names and jax.default_backend() == "cpu":
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            flag = f"--buffer-size {config.buffer_size}: " if hasattr(config, "buffer_size") else ""
            cli.fail(f"{flag}a run needs {needed / 2**30:.1f} GiB; this machine has {present / 2**30:.1f} GiB")


def check_folders(out_folder, script, runs, grid, options, base_points=None):
    """Write each run's `config.json`; fail with nothing written where there is another run, or none to resume."""
    check_unfinished(out_folder, runs, options)
    descriptions = {run.folder: record.describe(script, run.config, run.seed, base_points) for run in runs}
    for folder, description in descriptions.items():
        check_folder(folder, description, options)
    if grid:
        seeds = [runs[0].seed, runs[-1].seed]
        descriptions[out_folder] = sweep.describe(descriptions[runs[0].folder], grid, seeds)
        old = record.read_config(out_folder) if out_folder.exists() else descriptions[out_folder]
        changes = record.differences(old, descriptions[out_folder])
        if changes:
            there = f"{out_folder} holds a different sweep ({'; '.join(changes)})"
            cli.fail(f"--name {options.name}: {there}; choose another name")
    distributed.synchronize("checked")
    problem = write_configs(out_folder, descriptions) if distributed.is_first() else ""
    if any(distributed.any_process(problem != "")):
        cli.fail(f"--out {options.out}: cannot write there: {problem or 'see process 0'}")


def check_unfinished(out_folder, runs, options):
    """Fail where an unfinished command shares seeds with this one, unless this one resumes it."""
    first, last = runs[0].seed, runs[-1].seed
    for path in out_folder.glob("checkpoint_*_*"):
        start, end = map(int, path.name.split("_")[1:])
        if start <= last and first <= end and not (options.resume and (start, end) == (first, last)):
            flags = f"--seed {start} --num-seeds {end - start + 1} --resume"
            cli.fail(f"--name {options.name}: {out_folder} holds an unfinished run; continue it with {flags}")


def check_folder(folder, description, options):
    """Fail where the folder of a run holds a different run, or nothing to resume."""
    if options.resume and not (folder / "config.json").exists():
        cli.fail(f"--resume: nothing to resume in {folder}")
    if not folder.exists() or all(file.name.startswith(".") for file in folder.iterdir()):
        return
    changes = "; ".join(record.differences(record.read_config(folder), description))
    if changes and options.resume:
        cli.fail(f"--resume: {folder} was run differently: {changes}")
    if changes:
        cli.fail(f"--name {options.name}: {folder} holds a different run ({changes}); choose another name")


def write_configs(out_folder, descriptions):
    """Write `config.json` in all folders; returns the error message where that fails, or else ""."""
    try:
        for folder in {out_folder, *descriptions}:
            record.remove_leftovers(folder)
        for folder, description in descriptions.items():
            record.write_config(folder, description)
    except OSError as error:
        return str(error)
    return ""
