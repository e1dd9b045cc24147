"""Measure both gradients of SVG: time and memory over horizon and parameters; write `gradients.md`.

    python results/gradients.py

The gradient is that of 16 rollouts through Pendulum-v1, forward in time (manual), by backpropagation (autodiff), and by
backpropagation that computes each step twice (remat). Memory is what the compiled program allocates beside its
arguments and results. Times are medians, the three taking turns, on one core. Close other programs.
"""

import argparse
import os
import statistics
import time

os.environ["NPROC"] = "1"

import jax
from benchmark import ROOT, machine
from jax.flatten_util import ravel_pytree

from algorithms import svg
from common import devices

KINDS = {"manual": {"gradient": "manual"}, "autodiff": {}, "remat": {"remat": True}}
HIDDEN = ((), (8,), (16, 16), (32, 32), (64, 64))
HORIZONS = (10, 50, 200)


def compile_gradients(hidden_sizes, horizon):
    """`(number of parameters, {kind: (call, temporary bytes)})`."""
    base = {"num_rollouts": 16, "hidden_sizes": hidden_sizes, "horizon": horizon}
    calls = {}
    for kind, fields in KINDS.items():
        config = svg.Config(**base, **fields)
        params = svg.init(config, jax.random.key(0)).params
        arguments = config, params, *svg.draw(config, (), (), jax.random.key(1))
        program = jax.jit(svg.policy_gradient, compiler_options=devices.cpu_compiler_options())
        compiled = program.lower(*arguments).compile()
        call = lambda compiled=compiled, arguments=arguments: jax.block_until_ready(compiled(*arguments))
        calls[kind] = call, compiled.memory_analysis().temp_size_in_bytes
    return len(ravel_pytree(params.actor)[0]), calls


def milliseconds(calls, repeats):
    """Median time of each call, taking turns; each call is made twice, since the one before leaves the caches cold."""
    spent = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, spent, strict=True):
            call()
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
    return [statistics.median(times) for times in spent]


def main():
    """Parse the command line; measure; write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    lines = [
        f"SVG's gradient of 16 rollouts through Pendulum-v1: time, median of {repeats}, on one core, and memory.",
        f"`python results/gradients.py --repeats {repeats}`",
        f"on {machine()}.",
        "",
        "| parameters | horizon | manual | autodiff | remat | manual | autodiff | remat |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for hidden_sizes in HIDDEN:
        for horizon in HORIZONS:
            size, calls = compile_gradients(hidden_sizes, horizon)
            times = milliseconds([call for call, _ in calls.values()], repeats)
            cells = [f"{x:,.1f} ms" for x in times] + [f"{x / 2**20:,.2f} MiB" for _, x in calls.values()]
            lines.append(f"| {size:,} | {horizon} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    (ROOT / "results" / "gradients.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
