"""Checks before a command writes anything; each mistake ends it with one line."""

import contextlib
import dataclasses
import functools
import math
import os

import jax

from amortax.common import checkpoint, cli, devices, distributed, envs, record, sweep

OF_A_SEED = ("seed", *record.PLACE)  # entries of `config.json` in which the seeds of a group may differ
NAME_MAX = 255  # bytes in the name of a folder, on all common file systems


def check_config(config, function):
    """Trace `function(config, key)`, such as `init`; fail on what it refuses or what memory cannot hold.

    The configuration is concrete while it is traced, so that its values can be checked.
    """
    try:
        result = jax.eval_shape(lambda key: function(config, key), jax.random.key(0))
    except ValueError as error:
        if envs.explain(getattr(config, "env", None), error):
            raise
        fitting = fitting_envs(config, function) if str(error).startswith("env=") else ()
        cli.fail_field(config, error, f"; some that fit: {', '.join(fitting)}" if fitting else "")
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(result))
    present = devices.total_memory()
    if jax.default_backend() == "cpu" and needed > present:
        flag = f"--buffer-size {config.buffer_size}: " if hasattr(config, "buffer_size") else ""
        cli.fail(f"{flag}a run needs {needed / 2**30:.1f} GiB; this machine has {present / 2**30:.1f} GiB")


def fitting_envs(config, function):
    """Names of environments with bounded continuous or Discrete actions, of which `function` takes the first."""
    for names in (envs.CONTINUOUS_ENVS, envs.DISCRETE_ENVS):
        with contextlib.suppress(ValueError):
            jax.eval_shape(functools.partial(function, dataclasses.replace(config, env=names[0])), jax.random.key(0))
            return names
    return ()


def check_folders(out_folder, script, runs, grid, options, files=None, functions=None):
    """Write each run's `config.json`; fail with nothing written where there is another run, or none to resume.

    Returns the runs, with these descriptions. With `functions`, the `init`, `epoch` and `num_epochs` of the algorithm,
    --resume may also extend runs.
    """
    longest = max((out_folder.name, *(run.group.name for run in runs)), key=lambda name: len(os.fsencode(name)))
    if len(os.fsencode(longest)) > NAME_MAX:
        what = f"the name of the folder {longest}" if grid else "it"
        cli.fail(f"--name {options.name}: {what} must have at most {NAME_MAX} bytes, not {len(os.fsencode(longest))}")
    descriptions = {run.folder: record.describe(script, run.config, run.seed, files) for run in runs}
    try:
        check_unfinished(out_folder, runs, options)
        found = {run.folder: check_folder(run, descriptions[run.folder], options, functions) for run in runs}
        for group in {run.group for run in runs if not options.resume}:
            check_group(group, descriptions, options)
    except OSError as error:
        cli.fail(f"--out {options.out}: cannot be read: {error.strerror}")
    if functions and options.resume:
        check_extensions(runs, found, functions)
    moved = dict.fromkeys(line for f, old in found.items() for line in record.place_differences(old, descriptions[f]))
    if moved and distributed.is_first():
        what = f"--resume on another device or with other versions ({'; '.join(moved)})"
        cli.warn(f"{what}: the result may differ from an unbroken run's")
    kept = ("config", "source")  # where a resumed run began stays written down
    descriptions = {f: found[f] | {name: x[name] for name in kept} for f, x in descriptions.items()}
    if grid:
        seeds = [runs[0].seed, runs[-1].seed]
        descriptions[out_folder] = sweep.describe(descriptions[runs[0].folder], grid, seeds)
        is_new = not (out_folder / "config.json").exists()
        old = descriptions[out_folder] if is_new else record.read_config(out_folder)
        changes = record.differences(old, descriptions[out_folder])
        if options.resume:  # the fields of its runs have been compared, and these may have become longer
            changes = [line for line in changes if not line.startswith("config.")]
        if changes:
            there = f"{out_folder} holds a different sweep ({'; '.join(changes)})"
            cli.fail(f"--name {options.name}: {there}; choose another name")
    distributed.synchronize("checked")
    problem = write_configs(out_folder, descriptions) if distributed.is_first() else ""
    if any(distributed.any_process(problem != "")):
        cli.fail(f"--out {options.out}: cannot write there: {problem or 'see process 0'}")
    return [run._replace(description=descriptions[run.folder]) for run in runs]


def check_unfinished(out_folder, runs, options):
    """Fail where an unfinished command shares seeds with this one, unless this one resumes it."""
    first, last = runs[0].seed, runs[-1].seed
    for path in out_folder.glob("checkpoint_*_*"):
        if not record.is_ours(path, r"checkpoint_\d+_\d+"):
            continue
        start, end = map(int, path.name.split("_")[1:])
        if start <= last and first <= end and not (options.resume and (start, end) == (first, last)):
            flags = f"--seed {start} --num-seeds {end - start + 1} --resume"
            how = f"continue it with: {checkpoint.command(path) or flags}"
            cli.fail(f"--name {options.name}: {out_folder} holds an unfinished run; {how}")


def check_folder(run, description, options, functions):
    """Fail where the folder of a run holds a different run, or nothing to resume; returns its description there.

    A run to resume may be from another device or of other versions, and it may become longer.
    """
    folder = run.folder
    if not (folder / "config.json").exists():
        if options.resume:
            cli.fail(f"--resume: nothing to resume in {folder}; without --resume it is started")
        found = next((name for name in record.RUN_FILES if (folder / name).exists()), None)
        if found:
            cli.fail(f"--name {options.name}: {folder} holds a {found}, but no config.json that tells of which run")
        return description
    old = record.read_config(folder)
    changes = record.differences(old, description)
    if options.resume:
        moved = record.place_differences(old, description)
        changes = [line for line in changes if line not in moved]
        if changes and not (functions and is_longer(old, description, run.config, functions)):
            then = {k: v for k, v in old["config"].items() if v != description["config"].get(k, v)}
            how = f"; it was run with {cli.flags(then)}" if then else ""
            cli.fail(f"--resume: {folder} was run differently: {'; '.join(changes)}{how}")
    elif changes:
        cli.fail(f"--name {options.name}: {folder} holds a different run ({'; '.join(changes)}); choose another name")
    return old


def is_longer(old, new, config, functions):
    """Whether a run, of description `new` and `config`, has more epochs than `old`, and differs in static fields alone.

    Whether these fields decide only its length is left to `check_extensions`.
    """
    changes = {line.split(":")[0] for line in record.differences(old, new)}
    if not all(name.startswith(("config.", *record.PLACE)) for name in changes):
        return False
    try:
        shorter = record.read_fields(type(config), old["config"])
    except TypeError:  # other fields
        return False
    *_, num_epochs = functions
    return jax.tree.leaves(shorter) == jax.tree.leaves(config) and num_epochs(shorter) < num_epochs(config)


def check_extensions(runs, found, functions):
    """Fail where a run that becomes longer would not end as a run of that length, or has not kept its last state."""
    init, epoch, num_epochs = functions
    compared = set()
    for run in runs:
        shorter = record.read_fields(type(run.config), found[run.folder]["config"])
        static = tuple(jax.tree.structure(config) for config in (shorter, run.config))
        if static[0] == static[1]:
            continue
        texts = [] if static in compared else [program_text(config, init, epoch) for config in (shorter, run.config)]
        if len(set(texts)) > 1:
            changes = "; ".join(record.differences(found[run.folder]["config"], record.as_json(run.config)))
            why = "what it learns depends on this from the beginning on, by a schedule or in rounds"
            cli.fail(f"--resume: {run.folder} cannot be extended ({changes}): {why}; start a run of another name")
        compared.add(static)
        if record.num_rows(run.folder) == num_epochs(shorter) and not (run.folder / "state.npz").exists():
            cli.fail(f"--resume: {run.folder} cannot be extended: its last state was not kept (see --keep-state)")


def program_text(config, init, epoch):
    """The programs of a configuration, not compiled: two whose static fields only decide their length have the same."""
    key = jax.random.key(0)
    lowered = jax.jit(init).lower(config, key), jax.jit(epoch).lower(config, jax.eval_shape(init, config, key))
    return "".join(x.as_text() for x in lowered)


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
