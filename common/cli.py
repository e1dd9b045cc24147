"""Command line: every field of a `Config` as a flag, and one line on stderr for every mistake."""

import contextlib
import dataclasses
import inspect
import io
import re
import sys
import typing
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

INT_MAX = 2**31 - 1  # steps and seeds are counted in int32


@dataclasses.dataclass(frozen=True)
class Options:
    """Which seeds to run, and where the results go."""

    seed: Annotated[int, ">= 0"] = 0  # the first seed
    num_seeds: Annotated[int, ">= 1"] = 1  # number of seeds; on a CPU each is bitwise the run of that seed alone
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=VALUE,VALUE,... may be repeated: runs the whole grid
    name: str = "default"  # folder of this run, inside <out>/<algorithm>/<env>/
    out: Path = Path("results/runs")  # folder of all results
    resume: bool = False  # continue an interrupted or killed run of the same command
    no_plot: bool = False  # do not draw curve.png
    list_envs: bool = False  # only print the names of all environments
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # also log the metrics to one or both of these
    distributed: bool = False  # one of several processes that share the runs, detected by JAX (Slurm, Open MPI, ...)
    coordinator_address: str = ""  # host:port of process 0, where JAX does not detect it
    num_processes: int = 0  # number of processes, where JAX does not detect it
    process_id: int = -1  # number of this process, from 0, where JAX does not detect it


@dataclasses.dataclass(frozen=True)
class Data:
    """Files of base points: arrays obs, action (in the environment's units), reward, next_obs and terminated."""

    base_points: Path | None = None  # learn from the transitions in this .npz file, collected by whatever means
    save_base_points: Path | None = None  # write the first base points of the first seed to this .npz file


def show_warnings():
    """Show warnings, such as an algorithm's about an environment, in one line each on stderr."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def fail(message) -> NoReturn:
    """Report a user's mistake in one line on stderr and exit with code 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


def fail_field(config, error, hint="") -> NoReturn:
    """Report a ValueError `field=value: rule` about a field of `config` as its flag, any other one as it is."""
    named = re.fullmatch(r"(\w+)=(.*?): (.*)", str(error), re.DOTALL)
    if named and named[1] in [field.name for field in dataclasses.fields(config)]:
        fail(f"--{named[1].replace('_', '-')} {named[2]}: {named[3]}{hint}")
    fail(error)


def show_rules(dataclass, rule_of_ints=None):
    """Let `--help` show the rule of each number, as in `--gamma FLOAT in [0, 1]`.

    A rule is the text in the annotation of a field, such as `Annotated[float, "in [0, 1]"]`; an int without one has
    `rule_of_ints`.
    """
    annotated = typing.get_type_hints(dataclass, include_extras=True)
    for name, hint in typing.get_type_hints(dataclass).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        texts = [x for x in getattr(annotated[name], "__metadata__", ()) if isinstance(x, str)]
        rule = texts[0] if texts else rule_of_ints if kind is int else None
        if rule:
            metavar = getattr(kind, "__name__", "value").upper()
            metavar = f"{metavar if kind is hint else f'[{metavar} ...]'} {rule}"
            # tyro reads the annotations of the class; the types of its fields stay as they are
            dataclass.__annotations__[name] = Annotated[hint, rule, tyro.conf.arg(metavar=metavar)]


def parse(function, prog=None, description=None):
    """`tyro.cli`, with its boxed error message as one line; the exit code of an error is 2."""
    caught = io.StringIO()
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(function, prog=prog, description=description, config=markers)
    except SystemExit as error:
        if not error.code:
            raise
    lines = [line.strip("│ ") for line in caught.getvalue().splitlines()[1:]]
    message = " ".join(lines[: next((i for i, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))])
    meant = re.search(r"Perhaps you meant:\s+(--[\w-]+)", "\n".join(lines))
    fail(f"{message}{f' (perhaps you meant {meant[1]})' if meant else ''}; --help lists all flags")


def summary(algorithm):
    """The first line of the docstring of the module that defines `algorithm`, for `--help`."""
    return (sys.modules[algorithm.__module__].__doc__ or "").strip().split("\n")[0]


def parse_run(config_class, init):
    """Read `(Config, Options, Data)` from the command line; the options are checked, the configuration is not.

    The flags of `Data` exist where `init` takes base points.
    """

    def read(hyperparameter: config_class, run: Options):
        return hyperparameter, run, Data()

    def read_with_data(hyperparameter: config_class, run: Options, data: Data):
        return hyperparameter, run, data

    show_rules(config_class, rule_of_ints=">= 1")
    show_rules(Options)
    function = read_with_data if "base_points" in inspect.signature(init).parameters else read
    config, options, data = parse(function, prog=Path(sys.argv[0]).name, description=summary(config_class))
    check_range("num-seeds", options.num_seeds, 1, INT_MAX)
    check_range("seed", options.seed, 0, INT_MAX - options.num_seeds)
    if not re.fullmatch(r"\w[\w.+=-]*", options.name):
        fail(f"--name {options.name!r}: must be a plain folder name of letters, digits and . _ + = -")
    check_distributed(options)
    return config, options, data


def check_range(flag, value, low, high):
    """Fail unless `low <= value <= high`."""
    if not low <= value <= high:
        fail(f"--{flag} {value}: must be from {low} to {high}")


def check_distributed(options):
    """Fail where the flags of `--distributed` contradict each other."""
    address, number, index = options.coordinator_address, options.num_processes, options.process_id
    if not options.distributed and (address, number, index) != ("", 0, -1):
        fail("--coordinator-address, --num-processes and --process-id need --distributed")
    if address and not re.fullmatch(r"\S+:\d+", address):
        fail(f"--coordinator-address {address}: must be host:port")
    if number < 0:
        fail(f"--num-processes {number}: must be 1 or more")
    if index < -1 or (number and index >= number):
        fail(f"--process-id {index}: must be from 0 to {number - 1}, with --num-processes {number}")
