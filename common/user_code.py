"""The code of an environment that is not gymnax's own: its files and their hash, and its exceptions in one line."""

import ast
import hashlib
import importlib.util
import logging
import os
import re
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import flax
import gymnax
import jax
import numpy as np

from amortax.common import cli

LIBRARIES = [str(Path(module.__file__).parent) + os.sep for module in (os, jax, np, gymnax, flax, cli)]
logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # it would log what becomes one line here


def files(module_name, env):
    """`{module: file}` of what defines an environment: its classes, `module_name`, and what they use of the user's.

    Installed packages are named by their versions; only what is imported from them as the environment is a file here.
    """
    names = {cls.__module__ for cls in type(env).__mro__}
    for inner in vars(env).values():  # of a wrapper
        names |= {cls.__module__ for cls in type(inner).__mro__} if hasattr(inner, "reset") else set()
    names = {name for name in names if name.split(".")[0] not in ("gymnax", "builtins", "typing", "abc")}
    found, queue = {}, sorted(names | ({module_name} if module_name else set()))
    for name in queue:  # which grows
        file = getattr(sys.modules.get(name), "__file__", None)
        if name not in found and file and Path(file).is_file():
            found[name] = file
            queue += sorted(set(used(sys.modules[name])) - set(found))
    return found


def used(module):
    """Yield the names of the user's modules that a module imports."""
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        names = [alias.name for alias in getattr(node, "names", [])]
        if isinstance(node, ast.ImportFrom):
            origin = importlib.util.resolve_name("." * node.level + (node.module or ""), module.__package__ or None)
            names = [origin, *(f"{origin}.{name}" for name in names)]
        for name in names if isinstance(node, ast.Import | ast.ImportFrom) else []:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and "site-packages" not in file and not is_library(file) and not name.startswith("amortax"):
                yield name


def sha256(files):
    """SHA-256 of the contents of `files`, wherever they are."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        digest.update(name.encode() + hashlib.sha256(Path(file).read_bytes()).digest())
    return digest.hexdigest()


def is_library(file):
    """Whether a file belongs to Python, to the packages that call an environment, or to this folder."""
    standard, *others = LIBRARIES
    in_standard = file.startswith(standard) and "site-packages" not in file
    return file.startswith("<") or in_standard or file.startswith(tuple(others))


# Exceptions


def fail(name, error, show_traceback=False, doing="") -> NoReturn:
    """Report an exception from inside the environment `name` in one line, after its traceback if that is asked for."""
    if show_traceback:
        traceback.print_exception(error)
    cli.fail(f"--env {name}: {doing}{line(error, frames(error))}")


def frames(error):
    """`[(file, line)]`, the innermost last, of an exception: of the host's Python where a program has called it."""
    called_back = re.findall(r'File "(.+?)", line (\d+)', str(error)) if "callback: Traceback" in str(error) else []
    found = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        found.append((error.filename, error.lineno))
    return found + [(file, int(number)) for file, number in called_back]


def place(frames):
    """The innermost frame that is no library's; None where all are."""
    return next(((file, number) for file, number in reversed(frames) if not is_library(file)), None)


def line(error, frames):
    """Type and first line of an exception's message, and the innermost frame that is no library's."""
    message = str(error).strip().split("\n")
    # of an exception on the host the message is a traceback, which ends in what was raised there
    said = f"{type(error).__name__}: {message[0]:.300}" if "callback: Traceback" not in message[0] else message[-1]
    if not place(frames):
        return said
    file, number = place(frames)
    return f"{said} ({os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file}, line {number})"


def explain(files, error, show_traceback=False):
    """An exception in one line, if it comes from inside an environment of these `files`; else None.

    Its traceback is printed before if that is asked for.
    """
    all_frames = frames(error)
    main = getattr(sys.modules["__main__"], "__file__", None)  # its frames are in every traceback
    inside = [i for i, (file, _) in enumerate(all_frames) if file in files.values() and file != main]
    if inside and show_traceback:
        traceback.print_exception(error)
    return line(error, all_frames[inside[0] :]) if inside else None
