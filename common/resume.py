"""Where a command continues: at its checkpoint, or after what the last states of its finished runs have done."""

import itertools

from amortax.common import checkpoint, record
from amortax.common.checkpoint import Position


def position(runs, num_epochs, checkpoints):
    """Where to continue: with the round of the checkpoint, or else with the first run that is not complete."""
    saved = checkpoint.latest(checkpoints)
    if saved:
        of_round = runs[saved.first : saved.last]
        # a kill while a later round wrote its files may have left them behind this checkpoint
        usable = list(itertools.takewhile(lambda run: has_rows(run, saved.epochs), of_round))
        if not all(is_complete(run, num_epochs) for run in usable):
            return saved._replace(last=saved.first + len(usable))
    return next_position(runs, 0, num_epochs)


def is_complete(run, num_epochs):
    """Whether the files of a run are those of its end."""
    return (run.folder / "policy.npz").exists() and has_rows(run, num_epochs)


def has_rows(run, epochs):
    """Whether the metrics of a run are those of so many epochs at least, or it has diverged."""
    num = record.num_rows(run.folder)
    return num >= epochs or record.has_diverged(record.read_rows(run.folder, num))


def next_position(runs, first, num_epochs, resumed=True):
    """Where to continue with the first run from `first` on that is not complete: at its last state, if it was kept.

    If the command is not `resumed`, whatever there is is trained anew.
    """
    if not resumed:
        return Position(first, len(runs), 0)
    first = next((i for i in range(first, len(runs)) if not is_complete(runs[i], num_epochs)), len(runs))
    if first == len(runs):
        return Position(first, first, 0)
    epochs = num_kept(runs[first], num_epochs)
    together = itertools.takewhile(lambda run: num_kept(run, num_epochs) == epochs, runs[first:])
    return Position(first, first + len(list(together)), epochs)


def num_kept(run, num_epochs):
    """After how many epochs the last state of a shorter run is; 0 without one, or where a kill left it ahead of the
    metrics, which are written after it.
    """
    epochs = checkpoint.kept_epochs(run.folder)
    return epochs if epochs < num_epochs and epochs <= record.num_rows(run.folder) else 0


def restore(runs, position, checkpoints, like):
    """The arrays of the states at `position` of these runs, a round; `like` has their shapes and types."""
    saved = checkpoint.latest(checkpoints)
    if saved and (saved.first, saved.epochs) == (position.first, position.epochs):
        return checkpoint.restore(checkpoints, like)
    return checkpoint.restore_kept([run.folder for run in runs], like)
