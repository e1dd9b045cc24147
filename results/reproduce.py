"""Reproduce the tables and figures of this folder by named experiments.

    python results/reproduce.py --list                 names of the experiments
    python results/reproduce.py overestimation         run one, or several, or `all`
    python results/reproduce.py all --quick            small versions of them, in results/runs/quick
    python results/reproduce.py all --redraw           figures and text from the data in this folder; measures nothing

An experiment writes its data, data/NAME.csv, and from these alone its figure, figures/NAME.png, and its section of
README.md. Finished cells are kept in results/runs/reproduce, from which an interrupted experiment resumes; with the
same code on the same machine reruns are byte-identical except for timings.
"""

import dataclasses
import datetime
import importlib.util
import re
import signal
import sys
import time
from typing import Annotated

import tyro
from benchmark.benchmark import machine, write_between
from experiments import (
    amortization_gap,
    amortization_time,
    boltzmann,
    claims,
    closed_form,
    control_suite,
    curves,
    distributions,
    estimators,
    films,
    gradient_variance,
    lineage,
    maximizers,
    optimum,
    smooth_critics,
    study,
    svg_gradients,
    training,
)
from experiments.study import RESULTS, ROOT

from amortax.common import cli, plot, record

MODULES = (lineage, films, optimum, curves, control_suite, claims, smooth_critics, closed_form, boltzmann)
MODULES += (estimators, distributions, gradient_variance, svg_gradients, maximizers)
MODULES += (amortization_time, amortization_gap)
EXPERIMENTS = {name: experiment for module in MODULES for name, experiment in module.EXPERIMENTS.items()}
PLAYGROUND = importlib.util.find_spec("mujoco_playground") is not None
# claims in the table of the project's README; that of this folder's README has all
SELECTED = ("amortization", "amortization_gap", "overestimation", "policy_delay", "exploration", "smooth_costs")
SELECTED += ("boltzmann", "closed_form_2", "pathwise_returns", "locomotion")


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Reproduce tables and figures by named experiments."""

    # names of experiments, or `all`
    experiments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="EXPERIMENT")] = ()
    list: bool = False  # print the names and exit
    quick: bool = False  # small versions, to test that everything works
    redraw: bool = False  # figures and text from existing data; measure nothing
    out: cli.OptionalPath = None  # folder of the results; by default results, or results/runs/quick with --quick


def main():
    """Command line."""
    options = cli.parse(Reproduce, prog="python results/reproduce.py")
    if options.list:
        with cli.printing():
            print("\n".join(f"{name:26}{experiment.title}" for name, experiment in EXPERIMENTS.items()))
        return
    names = list(EXPERIMENTS) if options.experiments == ("all",) else options.experiments
    for name in names:
        if name not in EXPERIMENTS:
            cli.fail(f"{name}: no such experiment; --list prints all names")
    if not names:
        cli.fail("no experiment given; --list prints all names, and `all` runs all of them")
    if options.quick and options.redraw:
        cli.fail("--redraw: not with --quick")
    out = options.out or (RESULTS / "runs" / "quick" if options.quick else RESULTS)
    for name in names:
        if not options.redraw and needs_playground(name, options.quick) and not PLAYGROUND:
            message = f'{name}: needs the extra playground: pip install -e ".[playground]"'
            if options.experiments != ("all",):
                cli.fail(message)
            print(f"{message}; skipped", flush=True)
            continue
        try:
            redraw(name, out) if options.redraw else reproduce(name, out, options.quick)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            raise SystemExit(130) from None


def cells_of(name, quick):
    """`{label: cell}` of an experiment or its small version."""
    experiment = EXPERIMENTS[name]
    return experiment.quick(experiment.cells) if quick else experiment.cells


def needs_playground(name, quick):
    """Whether a cell trains in MuJoCo Playground."""
    cells = cells_of(name, quick).values()
    return any(isinstance(cell, training.Run) and cell.env.startswith("playground/") for cell in cells)


def reproduce(name, out, quick):
    """Measure the missing cells of an experiment and write its files."""
    experiment = EXPERIMENTS[name]
    rows = []
    for label, cell in cells_of(name, quick).items():
        path = training.WORK / "cells" / f"{training.fingerprint(experiment, cell)}.csv"
        if not path.exists():
            start = time.monotonic()
            record.write_rows(path, experiment.measure(cell))
            print(f"{name}: {label}: {time.monotonic() - start:.0f} s", flush=True)
        rows += [{"label": label} | row for row in study.read(path)]
    record.write_rows(out / "data" / f"{name}.csv", rows)
    command = f"python results/reproduce.py {name}" + " --quick" * quick
    engine = record.ENGINES["playground"] if needs_playground(name, quick) else ()
    write(name, out, f"`{command}`, {datetime.date.today()}, on {machine(*engine)}")


def redraw(name, out):
    """Write the figure and the section of an experiment anew from its data, which keep their date and machine."""
    readme = out / "README.md"
    text = readme.read_text() if readme.exists() else ""
    origin = origin_of(name, text)
    if not origin or not (out / "data" / f"{name}.csv").exists():
        cli.fail(f"--redraw: {out} has no data or no section of {name}; run the experiment first")
    write(name, out, origin)


def origin_of(name, text):
    """How, when and where an experiment was measured, as its section in `text` says; None where it has none."""
    found = re.search(rf"^(`python results/reproduce\.py {name}( --quick)?`, .*)\. Data: ", text, re.MULTILINE)
    return found and found[1]


def write(name, out, origin):
    """Write figure, section and tables of claims from data; `origin` says how, when and where they were measured."""
    experiment = EXPERIMENTS[name]
    rows = study.numbers(study.read(out / "data" / f"{name}.csv"))
    if experiment.draw:
        save(experiment.draw(rows), out / figure_path(name))
    write_between(out / "README.md", name, section(name, rows, origin))
    if out == RESULTS:
        write_between(RESULTS / "README.md", "claims", claims_table(EXPERIMENTS))
        write_between(ROOT / "README.md", "claims", claims_table(SELECTED, "results/README.md"))
    print(f"{name}: {out / 'data' / name}.csv", flush=True)


def figure_path(name):
    """The path of an experiment's figure, relative to the folder of the results."""
    return f"figures/{name}.{EXPERIMENTS[name].figure_type}"


def save(drawn, path):
    """Write a figure, or the bytes of a GIF."""
    if isinstance(drawn, bytes):
        record.write_atomic(path, drawn)
    else:
        plot.save(drawn, path)


def section(name, rows, origin):
    """The section of `README.md`: heading, figure, report, and the origin of the data."""
    experiment = EXPERIMENTS[name]
    parts = [f'### <a name="{name}"></a>{experiment.title}']
    if experiment.draw:
        parts.append(f"![{experiment.title}]({figure_path(name)})")
    parts.append(study.report(experiment, rows))
    parts.append(f"{origin}. Data: [{name}.csv](data/{name}.csv), {experiment.sample}.")
    return "\n\n".join(parts)


def claims_table(names, page=""):
    """The claims among experiments `names` that have data in `results`, each with its verdict and a link to `page`."""
    lines = []
    for name in names:
        experiment, path = EXPERIMENTS[name], RESULTS / "data" / f"{name}.csv"
        if experiment.criterion and path.exists():
            verdict = study.verdict(study.judge(experiment, study.numbers(study.read(path))))
            lines.append([f"[{experiment.title}]({page}#{name})", re.split("[:.]", verdict.lower())[0]])
    return study.table(["claim", "verdict"], lines)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # which systems of jobs send: an interrupt too
    main()
