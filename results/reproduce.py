"""Regenerate the figures and tables of this folder from named experiments.

    python results/reproduce.py --list                 their names
    python results/reproduce.py overestimation         one, or several after each other, or `all`
    python results/reproduce.py all --quick            small versions of them, in results/runs/quick

An experiment leaves its raw numbers, NAME.csv, its figure, NAME.png, and its section of README.md, both made from
the raw numbers alone. What is finished is kept below results/runs/reproduce, so that one that was killed goes on from
there; the same code on the same machine gives the same .csv, byte for byte, but for measured times.
"""

import dataclasses
import datetime
import re
import sys
import time
from pathlib import Path
from typing import Annotated

import amortization_time
import boltzmann
import claims
import closed_form
import curves
import distributions
import estimators
import films
import gradient_variance
import lineage
import maximizers
import optimum
import study
import svg_gradients
import tyro
from benchmark import machine
from study import ROOT, WORK

from common import cli, plot, record

MODULES = (lineage, films, optimum, curves, claims, closed_form, boltzmann)
MODULES += (estimators, distributions, gradient_variance, svg_gradients, maximizers, amortization_time)
EXPERIMENTS = {name: experiment for module in MODULES for name, experiment in module.EXPERIMENTS.items()}
ALGORITHM_FILES = sorted((ROOT / "algorithms").glob("*.py"))


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Regenerate figures and tables from named experiments."""

    # names of experiments, or `all`
    experiments: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="EXPERIMENT")] = ()
    list: bool = False  # print the names, and do nothing else
    quick: bool = False  # small versions, which show that all works, and nothing besides
    out: Path | None = None  # folder of the results; results, or results/runs/quick with --quick


def main():
    """Command line."""
    options = cli.parse(Reproduce, prog="python results/reproduce.py")
    if options.list:
        print("\n".join(f"{name:24}{experiment.title}" for name, experiment in EXPERIMENTS.items()))
        return
    names = list(EXPERIMENTS) if options.experiments == ("all",) else options.experiments
    for name in names:
        if name not in EXPERIMENTS:
            cli.fail(f"{name}: no such experiment; --list names them")
    if not names:
        cli.fail("no experiment named; --list names them, and `all` is all of them")
    out = options.out or (WORK.parent / "quick" if options.quick else ROOT / "results")
    for name in names:
        try:
            reproduce(name, out, options.quick)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from there", file=sys.stderr)
            raise SystemExit(130) from None


def reproduce(name, out, quick):
    """Measure what is not yet measured of an experiment, and write its files."""
    experiment = EXPERIMENTS[name]
    rows = []
    for label, cell in (experiment.quick(experiment.cells) if quick else experiment.cells).items():
        path = WORK / "cells" / f"{fingerprint(experiment, cell)}.csv"
        if not path.exists():
            begin = time.monotonic()
            record.write_rows(path, experiment.measure(cell))
            print(f"{name}: {label}: {time.monotonic() - begin:.0f} s", flush=True)
        rows += [{"label": label} | row for row in study.read(path)]
    record.write_rows(out / f"{name}.csv", rows)
    rows = study.numbers(study.read(out / f"{name}.csv"))
    if experiment.draw:
        save(experiment.draw(rows), out / picture(name))
    write_between(out / "README.md", name, section(name, rows, quick))
    if out == ROOT / "results" and not quick:
        write_between(ROOT / "README.md", "claims", claims_table())
    print(f"{name}: {out / name}.csv", flush=True)


def picture(name):
    """The file name of an experiment's figure."""
    return f"{name}.{EXPERIMENTS[name].picture}"


def save(drawn, path):
    """Write a figure, or the bytes of a film."""
    if isinstance(drawn, bytes):
        record.write_atomic(path, drawn)
    else:
        plot.save(drawn, path)


def fingerprint(experiment, cell):
    """Names what a cell measures, with the code and versions that decide its numbers."""
    sources = [study.source(cell)] if isinstance(cell, study.Run) else [*map(Path.read_text, ALGORITHM_FILES)]
    sources += [(ROOT / "results" / f"{source}.py").read_text() for source in experiment.sources]
    return study.digest("\n".join([experiment.measure.__qualname__, repr(cell), *sources]))


def section(name, rows, quick):
    """The section of `README.md`: heading, figure, what it says, and where its numbers come from."""
    experiment = EXPERIMENTS[name]
    anchor = f'### <a name="{name}"></a>{experiment.title}'
    shown = [f"![{experiment.title}]({picture(name)})", ""] if experiment.draw else []
    command = f"python results/reproduce.py {name}" + " --quick" * quick
    source = f"`{command}`, {datetime.date.today()}, on {machine()}. Numbers: [{name}.csv]({name}.csv)"
    return "\n".join([anchor, "", *shown, experiment.report(rows), "", f"{source}, {experiment.sample}."])


def claims_table():
    """The claims whose numbers are in `results`, each with its verdict, for the project's README."""
    lines = []
    for name, experiment in EXPERIMENTS.items():
        path = ROOT / "results" / f"{name}.csv"
        found = path.exists() and re.match(r"\*\*(.+?)\.\*\*", experiment.report(study.numbers(study.read(path))))
        if found:
            lines.append([f"[{experiment.title}](results/README.md#{name})", found[1].lower()])
    return study.table(["claim", "verdict"], lines)


def write_between(path, name, text):
    """Put a text between its two markers in a file, which it gets at the file's end if it has none."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    old = path.read_text() if path.exists() else "# Results\n"
    if begin not in old:
        old += f"\n{begin}\n{end}\n"
    before, rest = old.split(begin, 1)
    record.write_atomic(path, f"{before}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}".encode())


if __name__ == "__main__":
    main()
