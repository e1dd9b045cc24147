"""The end of a command: its curves, its result as text, and its exit code."""

import numpy as np

from amortax.common import distributed, divergence, plot, record, sweep


def report(runs, out_folder, grid, options):
    """Draw the curves, print the result, and return the exit code."""
    columns = [record.read_metrics(run.folder) for run in runs]
    finite = np.array([bool(c["finite"][-1]) for c in columns])
    final = np.array([c["eval_return_mean"][-1] for c in columns])
    if not distributed.is_first():
        return 0 if finite.all() else 1
    if not options.no_plot:
        for group in dict.fromkeys(run.group for run in runs):
            plot.draw(group)
    longest = max(columns, key=lambda c: len(c["finite"]))  # a diverged run has fewer rows
    after = f"greedy return after {record.amount({name: x[-1] for name, x in longest.items()})}"
    if grid:
        table = sweep.table(grid, final.reshape(-1, options.num_seeds), finite.reshape(-1, options.num_seeds))
        sweep.write(out_folder, grid, table, with_plot=not options.no_plot)
        print(f"{after}, interquartile mean of {options.num_seeds} seeds:\n\n{sweep.text(table)}\n")
    elif finite.sum() > 1:
        print(f"{after}: {plot.summary(final[finite])}")
    elif finite.any():
        deviation = columns[finite.argmax()]["eval_return_std"][-1]
        print(f"{after}: {final[finite][0]:.1f} (mean over episodes, standard deviation {deviation:.1f})")
    for run, c in zip(runs, columns, strict=True):
        if not c["finite"][-1] and run.folder not in divergence.announced:  # by an earlier command, then
            divergence.announce(run, runs, "", {name: x[-1] for name, x in c.items()})
    divergence.announced.clear()
    print(f"results: {out_folder}")
    return 0 if finite.all() else 1
