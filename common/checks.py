"""Checks before a command writes anything; each mistake ends it with one line."""

import math
import os

import jax

from amortax.common import cli, distributed, envs, record, sweep

OF_A_SEED = ("seed", *record.PLACE)  # entries of `config.json` in which the seeds of a group may differ
NAME_MAX = 255  # bytes in the name of a folder, on all common file systems


def check_config(config, function):
    """Trace `function(config, key)`, such as `init`; fail on what it refuses or what memory cannot hold.

    The configuration is concrete while it is traced, so that its values can be checked.
    """
    try:
        result = jax.eval_shape(lambda key: function(config, key), jax.random.key(0))
    except ValueError as error:
        about_env = str(error).startswith("env=")
        cli.fail_field(config, error, f"; some that fit: {', '.join(envs.CONTINUOUS_ENVS)}" if about_env else "")
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(result))
    if "SC_PHYS_PAGES" in os.sysconf_names and jax.default_backend() == "cpu":
        present = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > present:
            flag = f"--buffer-size {config.buffer_size}: " if hasattr(config, "buffer_size") else ""
            cli.fail(f"{flag}a run needs {needed / 2**30:.1f} GiB; this machine has {present / 2**30:.1f} GiB")


def check_folders(out_folder, script, runs, grid, options, base_points=None):
    """Write each run's `config.json`; fail with nothing written where there is another run, or none to resume."""
    longest = max((out_folder.name, *(run.group.name for run in runs)), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > NAME_MAX:
        what = f"the name of the folder {longest}" if grid else "it"
        cli.fail(f"--name {options.name}: {what} must have at most {NAME_MAX} bytes, not {len(os.fsencode(longest))}")
    descriptions = {run.folder: record.describe(script, run.config, run.seed, base_points) for run in runs}
    try:
        check_unfinished(out_folder, runs, options)
        moved = [line for folder, x in descriptions.items() for line in check_folder(folder, x, options)]
        for group in {run.group for run in runs if not options.resume}:
            check_group(group, descriptions, options)
    except OSError as error:
        cli.fail(f"--out {options.out}: cannot be read: {error.strerror}")
    if moved and distributed.is_first():
        what = f"--resume on another device or with other versions ({'; '.join(dict.fromkeys(moved))})"
        cli.warn(f"{what}: the result may differ from an unbroken run's")
    if grid:
        seeds = [runs[0].seed, runs[-1].seed]
        descriptions[out_folder] = sweep.describe(descriptions[runs[0].folder], grid, seeds)
        is_new = not (out_folder / "config.json").exists()
        old = descriptions[out_folder] if is_new else record.read_config(out_folder)
        changes = record.differences(old, descriptions[out_folder])
        if options.resume:
            changes = [line for line in changes if line not in record.place_differences(old, descriptions[out_folder])]
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
        if not record.is_ours(path, r"checkpoint_\d+_\d+"):
            continue
        start, end = map(int, path.name.split("_")[1:])
        if start <= last and first <= end and not (options.resume and (start, end) == (first, last)):
            flags = f"--seed {start} --num-seeds {end - start + 1} --resume"
            cli.fail(f"--name {options.name}: {out_folder} holds an unfinished run; continue it with {flags}")


def check_folder(folder, description, options):
    """Fail where the folder of a run holds a different run, or nothing to resume.

    Returns how the place of a run to resume differs: it may be another device, or have other versions.
    """
    if not (folder / "config.json").exists():
        if options.resume:
            cli.fail(f"--resume: nothing to resume in {folder}")
        found = next((name for name in record.RUN_FILES if (folder / name).exists()), None)
        if found:
            cli.fail(f"--name {options.name}: {folder} holds a {found}, but no config.json that tells of which run")
        return []
    old = record.read_config(folder)
    changes, moved = record.differences(old, description), record.place_differences(old, description)
    if options.resume:
        changes = [line for line in changes if line not in moved]
        if changes:
            cli.fail(f"--resume: {folder} was run differently: {'; '.join(changes)}")
    elif changes:
        cli.fail(f"--name {options.name}: {folder} holds a different run ({'; '.join(changes)}); choose another name")
    return moved


def check_group(group, descriptions, options):
    """Fail where other seeds in the folder of a group are of another configuration: one curve is drawn of all."""
    folders = {record.seed_folder(group, seed) for seed in record.seeds(group)}
    new = next(x for folder, x in descriptions.items() if folder.parent == group)
    for folder in sorted(folders - set(descriptions)):
        old = record.read_config(folder) if (folder / "config.json").exists() else new
        changes = record.differences(*({k: v for k, v in x.items() if k not in OF_A_SEED} for x in (old, new)))
        if changes:
            said = f"{folder} is of another configuration ({'; '.join(changes)})"
            cli.fail(f"--name {options.name}: {said}, and a curve is drawn of all seeds; choose another name")


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
