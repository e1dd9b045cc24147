"""The command `amortax`: trains an algorithm of this package by its name, or plays a saved policy.

    amortax td3 --seed 0                                as python algorithms/td3.py --seed 0
    amortax play results/runs/td3/Pendulum-v1/default   as python -m amortax.common.play ...

The file of a command is executed as a script, so that its results are bitwise those of the script.
"""

import difflib
import importlib.util
import re
import sys
from pathlib import Path

from amortax.common import cli

PACKAGE = Path(__file__).parent.parent
USAGE = """usage: amortax COMMAND [FLAGS]

Train with an algorithm, or play a policy; amortax COMMAND --help lists the flags.
"""


def main():
    """Run the file of a command as a script; exit code 2 where there is none of that name."""
    files = {path.stem: path for path in sorted((PACKAGE / "algorithms").glob("[!_]*.py"))}
    files["play"] = PACKAGE / "common" / "play.py"
    command, *flags = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        with cli.printing():
            print(USAGE, *(f"  {name:20} {summary(path)}" for name, path in files.items()), sep="\n")
    elif command in files:
        sys.argv = [f"amortax {command}", *flags]
        run(files[command])
    else:
        (nearest,) = difflib.get_close_matches(command.lower(), files, n=1, cutoff=0)
        cli.fail(f"{command}: no such command; nearest: {nearest}; amortax --help lists all")


def summary(path):
    """The first line of a file's docstring, up to its first colon or comma."""
    with open(path, encoding="utf-8") as file:
        return re.split("[:,]", file.readline().strip('".\n'))[0]


def run(path):
    """Execute a file as `__main__`, as Python does with a script, but with `sys.argv` as it is."""
    spec = importlib.util.spec_from_file_location("__main__", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
