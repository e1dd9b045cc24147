"""Compiled programs, and a round: the runs that they train at once, so many on each device.

`init` and `epoch` are compiled with the state donated, as programs of one device, and called on every device: on a CPU
(a device a core) with one run at a time, on a GPU with all runs of the device vmapped. A program over all devices would
be a different one to XLA, and round differently; so on a CPU a run is bitwise the same whatever the number of runs,
devices and processes.
"""

import concurrent.futures
import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from amortax.common import cli, devices, divergence


class Programs(NamedTuple):
    """`init` and `epoch`, compiled for each of this process's devices in use; both batch `runs_per_device` runs."""

    init: list  # for each local device: (configs, seeds) -> states
    epoch: list  # for each local device: (configs, states) -> (states, metrics, finite)
    local_devices: list  # the devices in use of this process
    devices: list  # the devices in use of all processes, in the order of the runs that they hold
    runs_per_device: int
    shared: tuple = ()  # further arguments of `init`, the same for all runs

    @property
    def round_size(self):
        """How many runs are trained at once."""
        return len(self.devices) * self.runs_per_device


class Round(NamedTuple):
    """What the runs of a round differ in, a list entry for each local device; padded with copies of the last run."""

    run_indices: list  # the runs that a device holds, as indices into the round, without the copies
    configs: list  # leaves [runs_per_device]
    seeds: list  # [runs_per_device]


def compile_programs(config, init, epoch, num_runs, runs_per_device=None, shared=()):
    """Compile `init` and `epoch` for `num_runs` runs whose configurations differ from `config` in their leaves.

    By default a device of a CPU holds one run, another device as many as it takes to train all at once. `shared` are
    further arguments of `init`, the same for all runs. `epoch` also returns `finite [runs_per_device]`, see
    `divergence.is_finite`.
    """
    cpu = jax.default_backend() == "cpu"
    if runs_per_device is None:
        runs_per_device = 1 if cpu else math.ceil(num_runs / jax.device_count())
    used = devices.choose(math.ceil(num_runs / runs_per_device))
    local = [device for device in used if device.process_index == jax.process_index()]

    def seeded_init(config, seed, *shared):
        return init(config, jax.random.key(seed), *shared)

    def checked_epoch(config, state):
        state, metrics = epoch(config, state)
        return state, metrics, divergence.is_finite(state, metrics)

    configs = jax.tree.map(lambda x: np.zeros((), leaf_type(x)), config)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # `init` is compiled while `epoch` is traced

        def begin(*program):
            lowered = lower_for_each(local, runs_per_device, *program)
            return [(x.out_info, pool.submit(x.compile)) for x in lowered]

        starting = begin(seeded_init, configs, np.int32(0), *shared)
        states, _ = starting[0]  # all devices have the same
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), states)
        advancing = begin(checked_epoch, configs, state)
    compiled = [[x.result() for _, x in each] for each in (starting, advancing)]
    return Programs(*compiled, local, used, runs_per_device, shared)


def lower_for_each(local_devices, runs_per_device, function, config, state, *shared):
    """`function`, batched over the runs' first two arguments, the second donated, and lowered for each device."""
    jitted = jit_runs(function, runs_per_device, len(shared), donate_argnums=1)

    def lower(device):
        struct = functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
        batch = jax.tree.map(lambda x: struct((runs_per_device, *x.shape), x.dtype), (config, state))
        return jitted.lower(*batch, *jax.tree.map(lambda x: struct(x.shape, x.dtype), shared))

    return map(lower, local_devices)


def jit_runs(function, runs_per_device, num_shared=0, **options):
    """`function` with leading axes [runs_per_device] on its first two arguments and all results, jitted."""
    batched = jax.vmap(function, (0, 0, *[None] * num_shared)) if runs_per_device > 1 else unbatched(function)
    compiler_options = devices.cpu_compiler_options() if jax.default_backend() == "cpu" else None
    return jax.jit(batched, compiler_options=compiler_options, **options)


def unbatched(function):
    """`function` with a leading axis [1] on its first two arguments and all results, as the program of one run.

    By reshapes, not slices: the donated buffer must not be copied.
    """

    def of_one(config, state, *shared):
        one = function(*jax.tree.map(lambda x: x.reshape(x.shape[1:]), (config, state)), *shared)
        return jax.tree.map(lambda x: x.reshape(1, *x.shape), one)

    return of_one


def compile_to_fit(config, init, epoch, num_runs, limit, shared=()):
    """Programs with as many runs on a device as `limit` bytes hold; fails where they do not hold one."""
    programs = compile_programs(config, init, epoch, num_runs, shared=shared)
    needed = memory(programs)
    while needed > limit and programs.runs_per_device > 1:
        fitting = min(programs.runs_per_device - 1, int(programs.runs_per_device * limit / needed))
        programs = compile_programs(config, init, epoch, num_runs, max(1, fitting), shared)
        needed = memory(programs)
    if needed > limit:
        cli.fail(f"a run needs {needed / 2**30:.1f} GiB of its device; {limit / 2**30:.1f} GiB are available")
    return programs


def memory(programs):
    """Bytes on a device while it trains: the states of its runs and what advancing them takes besides."""
    sizes = programs.epoch[0].memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return total - sizes.alias_size_in_bytes


def leaf_type(x):
    """The type of a hyperparameter on a device."""
    return np.float32 if isinstance(x, float) else jnp.result_type(x)


def positions(programs):
    """For each local device, the positions in a round of the runs that it holds."""
    size = programs.runs_per_device
    return [range(i * size, i * size + size) for i, x in enumerate(programs.devices) if x in programs.local_devices]


def padded(positions, num_runs):
    """The indices of the runs at these positions: beyond the last run, copies of it."""
    return np.minimum(positions, num_runs - 1)


def place(programs, configs, seeds):
    """The `Round` of at most `programs.round_size` runs, given by lists of their configurations and seeds."""
    on_devices = Round([], [], [])
    for device, held in zip(programs.local_devices, positions(programs), strict=True):
        rows = padded(held, len(seeds))
        stacked = jax.tree.map(lambda *x: np.array(x, leaf_type(x[0])), *(configs[i] for i in rows))
        on_devices.run_indices.append([i for i in held if i < len(seeds)])
        on_devices.configs.append(jax.device_put(stacked, device))
        on_devices.seeds.append(jax.device_put(np.array([seeds[i] for i in rows], np.int32), device))
    return on_devices


def start(programs, batch):
    """The states of a round after `init`: a list, one entry for each local device."""
    shared = [jax.device_put(programs.shared, device) for device in programs.local_devices]
    inputs = zip(batch.configs, batch.seeds, shared, strict=True)
    return [init(*own, *same) for init, (*own, same) in zip(programs.init, inputs, strict=True)]


def advance(programs, batch, states):
    """Train one epoch: `(states, [(metrics, finite)])`, the latter on the host with leading axes [runs_per_device]."""
    outs = []
    for i, epoch in enumerate(programs.epoch):
        states[i], *out = epoch(batch.configs[i], states[i])  # returns at once, while the device works
        outs.append(out)
    while not all(x.is_ready() for x in jax.tree.leaves(outs)):
        time.sleep(0.005)  # signals are handled between two looks
    return states, jax.device_get(outs)


def by_run(batch, trees):
    """`{run index: tree}` from a list with one entry, of leading axis [runs_per_device], for each local device."""
    return {
        index: jax.tree.map(lambda x, k=k: x[k], tree)
        for indices, tree in zip(batch.run_indices, trees, strict=True)
        for k, index in enumerate(indices)
    }


# Checkpoints


def array_shapes(programs):
    """Shapes and types of what `to_arrays` makes, but with a leading axis of the runs of one device."""
    return jax.eval_shape(arrays, programs.init[0].out_info)


def arrays(state):
    """The leaves of a state, random keys as their data, without those that have no elements."""
    return [jax.random.key_data(x) if is_key(x) else x for x in jax.tree.leaves(state) if not is_empty(x)]


def is_empty(x):
    """Whether `x` has no elements, as some arrays of physics engines: Orbax cannot save it, and nothing is lost."""
    return math.prod(x.shape) == 0


def is_key(x):
    """Whether `x` holds random keys."""
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_arrays(programs, states):
    """The states as a list of arrays `[round_size, ...]` over all devices in use, random keys as their data.

    Those without elements are left out.
    """
    sharding = NamedSharding(Mesh(np.array(programs.devices), ("run",)), PartitionSpec("run"))
    leaves = [arrays(state) for state in states]
    return [
        jax.make_array_from_single_device_arrays((programs.round_size, *parts[0].shape[1:]), sharding, list(parts))
        for parts in zip(*leaves, strict=True)
    ]


def state_bytes(programs):
    """Bytes of the state of a run."""
    return sum(x.size * x.dtype.itemsize for x in array_shapes(programs)) / programs.runs_per_device


def arrays_by_run(batch, states):
    """`{run index: arrays}`, on the host, of one run each: the rows of what `to_arrays` makes."""
    return by_run(batch, [jax.tree.map(np.asarray, arrays(state)) for state in states])


def from_arrays(programs, arrays, num_runs):
    """The states of the first `num_runs` runs of `arrays`, which `to_arrays` made for any number of devices."""
    like, structure = jax.tree.flatten(programs.init[0].out_info)
    states = []
    for device, held in zip(programs.local_devices, positions(programs), strict=True):
        rows = padded(held, num_runs)
        placed = iter([jax.device_put(x[rows], device) for x in arrays])
        leaves = [jax.device_put(jnp.zeros(x.shape, x.dtype), device) if is_empty(x) else next(placed) for x in like]
        leaves = [jax.random.wrap_key_data(x) if is_key(y) else x for x, y in zip(leaves, like, strict=True)]
        states.append(jax.tree.unflatten(structure, leaves))
    return states
