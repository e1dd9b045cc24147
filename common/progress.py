"""Progress of a command: a bar on a terminal, a line per epoch elsewhere; printed by process 0."""

import contextlib

import numpy as np
import rich.console
import rich.progress

from amortax.common import distributed, record


@contextlib.contextmanager
def show():
    """Yield `report(text, done, total)`, which shows a text and how many epochs of how many are done."""
    console = rich.console.Console(highlight=False)
    columns = (rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"))
    silent = not console.is_terminal or not distributed.is_first()
    bar = rich.progress.Progress(*columns, console=console)
    with contextlib.nullcontext() if silent else bar:  # one that is disabled ends with an empty line before rich 14.3
        task = bar.add_task("", total=None)

        def report(text, done=0, total=None):
            bar.update(task, completed=done, total=total, description=text)
            if not console.is_terminal:
                distributed.print_once(text)

        yield report


def line(rows, num_runs, num_epochs, seconds, epochs_left):
    """A line on the last epoch: how far a run has come, mean return, rate of all runs, time left.

    `rows` are the metrics of this process's runs, `{run: rows}`, of which the last `num_epochs` took `seconds`.
    """
    run, *_ = rows.values()
    now, before = (float(record.progress(x[-1])) if x else 0.0 for x in (run, run[:-num_epochs]))
    rate = num_runs * (now - before) / seconds
    mean_return = np.mean([x[-1]["eval_return_mean"] for x in rows.values()])
    speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
    left = seconds / num_epochs * epochs_left
    end = f"{speed} {record.unit(run[-1])}/s  {left:.0f} s left"
    return f"{record.amount(run[-1])}  return {mean_return:.1f}  {end}"
