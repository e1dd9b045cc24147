"""Command line: every field of a `Config` as a flag, and one line on stderr for every mistake."""

import contextlib
import dataclasses
import inspect
import io
import os
import re
import shlex
import sys
import typing
import warnings
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro

INT_MAX = 2**31 - 1  # steps and seeds are counted in int32
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]  # without it the help shows {None}|PATH


@dataclasses.dataclass(frozen=True)
class Options:
    """Which seeds to run, and where the results go."""

    seed: Annotated[int, ">= 0"] = 0  # the first seed
    num_seeds: Annotated[int, ">= 1"] = 1  # number of seeds; on a CPU each is bitwise the run of that seed alone
    env_params: tuple[str, ...] = ()  # NAME=VALUE ...: fields of the environment's EnvParams, max_steps_in_episode=500
    sweep: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # FIELD=VALUE,VALUE,... may be repeated: runs the whole grid
    name: str = "default"  # folder of the seeds of one configuration, inside <out>/<algorithm>/<env>/
    out: Path = Path("results/runs")  # folder of all results
    resume: bool = False  # continue what the same command left; with a larger number of steps, extend a finished run
    init_from: OptionalPath = None  # start from the parameters of a run: its folder, or a policy.npz or policy_best.npz
    keep_state: Literal["small", "always", "never"] = "small"  # last state, to extend a run: small is up to 16 MB a run
    no_plot: bool = False  # do not draw curve.png
    list_envs: bool = False  # only print the names of all environments
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()  # also log the metrics to one or both of these
    traceback: bool = False  # show all of an exception from inside the environment, which gets one line otherwise
    distributed: bool = False  # one of several processes that share the runs, detected by JAX (Slurm, Open MPI, ...)
    coordinator_address: str = ""  # host:port of process 0, where JAX does not detect it
    num_processes: int = 0  # number of processes, where JAX does not detect it
    process_id: int = -1  # number of this process, from 0, where JAX does not detect it


@dataclasses.dataclass(frozen=True)
class Data:
    """Files of base points: arrays obs, action (in the environment's units), reward, next_obs and terminated."""

    base_points: OptionalPath = None  # learn from the transitions in this .npz file, collected by whatever means
    save_base_points: OptionalPath = None  # write the first base points of the first seed to this .npz file


def show_warnings():
    """Show warnings, such as an algorithm's about an environment, in one line each on stderr."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def warn(message):
    """Print a warning in one line on stderr."""
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def resume_command():
    """This command with all its flags, to be pasted into a shell, and --resume."""
    script, *given = sys.argv
    program = script.split() if script.startswith("amortax ") else ["python", script]  # see main.py
    return shlex.join([*program, *given, *([] if "--resume" in given else ["--resume"])])


def flags(fields):
    """The flags that give fields, by name, these values."""
    values = {name: x if isinstance(x, (list, tuple)) else [x] for name, x in fields.items()}
    return shlex.join(word for name, x in values.items() for word in ("--" + name.replace("_", "-"), *map(str, x)))


def fail(message, code=2) -> NoReturn:
    """Report a user's mistake in one line on stderr and exit with code 2, or another one."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


def fail_field(config, error, hint="") -> NoReturn:
    """Report a ValueError `field=value: rule` about a field of `config` as its flag, any other one as it is."""
    named = re.fullmatch(r"(\w+)=(.*?): (.*)", str(error), re.DOTALL)
    if named and named[1] in [field.name for field in dataclasses.fields(config)]:
        fail(f"--{named[1].replace('_', '-')} {named[2]}: {named[3]}{hint}")
    fail(error)


def show_rules(dataclass):
    """Let `--help` show the rule of each number, as in `--gamma FLOAT in [0, 1]`.

    A rule is the text in the annotation of a field, or of the items of a tuple: `Annotated[float, "in [0, 1]"]`.
    """
    annotated = typing.get_type_hints(dataclass, include_extras=True)
    for name, hint in typing.get_type_hints(dataclass).items():
        kind = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
        own = annotated[name]
        own = typing.get_args(own)[0] if typing.get_origin(own) is tuple else own
        rule = next((x for x in getattr(own, "__metadata__", ()) if isinstance(x, str)), None)
        if rule:
            metavar = getattr(kind, "__name__", "value").upper()
            metavar = f"{metavar if kind is hint else f'[{metavar} ...]'} {rule}"
            # tyro reads the annotations of the class; the types of its fields stay as they are
            dataclass.__annotations__[name] = Annotated[hint, rule, tyro.conf.arg(metavar=metavar)]


@contextlib.contextmanager
def printing():
    """Exit quietly with code 0 where the reader of what is printed within has enough of it, as `head` has."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a short text gets to its reader only here
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes at the end of the process
        raise SystemExit(0) from None


def parse(function, prog=None, description=None):
    """`tyro.cli`, with its boxed error message as one line; the exit code of an error is 2."""
    caught = io.StringIO()
    markers = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    try:
        with printing(), contextlib.redirect_stderr(caught):
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

    show_rules(config_class)
    show_rules(Options)
    function = read_with_data if "base_points" in inspect.signature(init).parameters else read
    config, options, data = parse(function, prog=Path(sys.argv[0]).name, description=summary(config_class))
    check_range("num-seeds", options.num_seeds, 1, INT_MAX)
    check_range("seed", options.seed, 0, INT_MAX - options.num_seeds)
    check_name(options.name)
    check_distributed(options)
    return config, options, data


def check_range(flag, value, low, high):
    """Fail unless `low <= value <= high`."""
    if not low <= value <= high:
        fail(f"--{flag} {value}: must be from {low} to {high}")


def check_name(name):
    """Fail unless `name` can be that of a folder on any system, beside the folder of a sweep."""
    if not re.fullmatch(r"\w([\w.+=-]*[\w+=-])?", name):
        fail(f"--name {name!r}: must be a plain folder name of letters, digits and . _ + = -, without a dot at its end")
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE):
        fail(f"--name {name}: must not be a name that Windows reserves for a device")
    if name.endswith("-sweep"):
        fail(f"--name {name}: must not end in -sweep: the table of a sweep has such a folder")


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
