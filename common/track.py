"""Tracking: logs the rows of `metrics.csv`, under the same names, to TensorBoard and Weights & Biases.

    seed_<s>/tensorboard/    event files
    seed_<s>/wandb/          wandb's own files, and `run.json`: the id of the last run and the last step it has for sure

Each seed is a run of its own, logged over steps or iterations as its curve is; a tracker is imported only when used.
"""

import contextlib
import importlib
import json
import secrets
import time

from amortax.common import cli, record

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb.sdk"}  # a folder named wandb would be imported as `wandb`
FLUSH_SECONDS = 5


class Failed(Exception):
    """A tracker refused; the message is written for the user."""


def check(kinds):
    """Fail where a package is missing, or wandb has neither a key nor somebody to ask for it."""
    for kind in kinds:
        try:
            importlib.import_module(PACKAGES[kind])
        except ImportError:
            cli.fail(f'--track {kind}: needs the package: pip install -e ".[{kind}]"')
    if "wandb" in kinds:
        import wandb

        try:
            if wandb.setup().settings.mode == "online":
                wandb.login(verify=False)
        except wandb.Error as error:
            cli.fail(f"--track wandb: {error}")


@contextlib.contextmanager
def tracking(kinds, resume):
    """Yield `log(folder, rows)`, which sends those rows of a run that it has not sent yet; close all at the end.

    `rows` are all rows so far, so that in the end all of `metrics.csv` is sent, also after an untracked beginning.
    `log` raises `Failed` where a run cannot be opened.
    """
    senders, sent = {}, {}
    with contextlib.ExitStack() as stack:

        def log(folder, rows):
            if folder not in senders:
                senders[folder] = [OPEN[kind](stack, folder, resume) for kind in dict.fromkeys(kinds)]
            # the rows of a resumed run are text
            new = [{name: float(value) for name, value in row.items()} for row in rows[sent.get(folder, 0) :]]
            for send in senders[folder]:
                send({int(record.progress(row)): row for row in new})
            sent[folder] = len(rows)

        yield log


def open_tensorboard(stack, folder, resume):
    """`send({x: row})` into a new event file, which replaces the events of earlier ones; `stack` closes it."""
    from tensorboardX import SummaryWriter

    # an earlier file lacks the events that a killed process lost: all are written again
    writer = SummaryWriter(
        str(folder / "tensorboard"),
        purge_step=0,
        flush_secs=FLUSH_SECONDS,
        filename_suffix=f".{time.time_ns()}",  # otherwise files of the same second have the same name
    )
    stack.enter_context(writer)
    description = json.dumps(record.read_config(folder), indent=2)
    writer.add_text("config", "".join(f"    {line}\n" for line in description.splitlines()), 0)  # verbatim in Markdown

    def send(rows):
        for x, row in rows.items():
            for name, value in row.items():
                writer.add_scalar(name, value, x)

    return send


def start_wandb(folder, run_id):
    """A new wandb run, or the one with this id, for the folder of a seed."""
    import wandb

    *group, seed = folder.parts[-4:]
    try:
        return wandb.init(
            project=wandb.setup().settings.project or "amortax",
            group="/".join(group),
            name="/".join([*group, seed]),
            id=run_id,
            resume="allow",
            reinit="create_new",
            dir=folder,
            config=record.read_config(folder),
            settings=wandb.Settings(console="off"),  # the output belongs to all runs
        )
    except wandb.Error as error:
        raise Failed(f"--track wandb: {error}") from error


def open_wandb(stack, folder, resume):
    """`send({x: row})` to a wandb run, with `resume` the last one of this folder; `stack` finishes it."""
    path = folder / "wandb" / "run.json"
    last = json.loads(path.read_text()) if resume and path.exists() else {"id": secrets.token_hex(4), "sent": -1}

    def keep():
        record.write_atomic(path, json.dumps(last).encode())

    keep()
    run = start_wandb(folder, last["id"])
    stack.callback(keep)  # after it has finished: a killed process loses what wandb has not sent
    stack.enter_context(run)
    first = run.starting_step or last["sent"] + 1  # a server knows its last step

    def send(rows):
        for x, row in rows.items():
            if x >= first:
                run.log(row, step=x, commit=True)
        last["sent"] = max(rows, default=last["sent"])

    return send


OPEN = {"tensorboard": open_tensorboard, "wandb": open_wandb}
