"""How much of a run's time its evaluations take, said at its end where that is much."""

import time

import gymnax
import jax

from amortax.common import contract, programs
from amortax.common.distributed import print_once

SHARE = 0.2  # of the time, above which it is said
SECONDS = 300  # of training, below which nobody minds, and nothing is measured


def report(training, batch, states, rows, seconds):
    """Print the share of evaluations if it is above `SHARE`; `rows` of a run were trained in `seconds`.

    An evaluation is compiled and timed by itself, so only where it simulates more steps than training does.
    """
    config, evaluate = training.runs[0].config, training.algorithm.get("evaluate")
    if seconds < SECONDS or len(rows) < 2 or not evaluate:
        return
    params = gymnax.make(config.env)[1]
    simulated = config.num_eval_episodes * getattr(params, "max_steps_in_episode", contract.max_steps(params))
    if simulated < rows[-1]["step"] - rows[-2]["step"]:
        return
    share = evaluation_seconds(training.programs, evaluate, batch, states) * len(rows) / seconds
    if share > SHARE:
        print_once(
            f"evaluations took about {share:.0%} of the time; less with fewer --num-eval-episodes, or more training "
            "between them"
        )


def evaluation_seconds(compiled, evaluate, batch, states):
    """Seconds of one evaluation of all runs of the first device."""

    def of_a_run(config, params):
        return evaluate(config, params, jax.random.key(0))

    inputs = batch.configs[0], states[0].params
    program = programs.jit_runs(of_a_run, compiled.runs_per_device).lower(*inputs).compile()
    start = time.perf_counter()
    jax.block_until_ready(program(*inputs))
    return time.perf_counter() - start
