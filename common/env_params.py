"""Parameters of an environment changed by words `NAME=VALUE`: any field of its `EnvParams`, of the type that it has."""

import ast
import dataclasses

import jax.numpy as jnp
import numpy as np

from amortax.common.cli import fail


def change(name, env, words):
    """A copy of the environment `name` whose default parameters are changed; fails on a word that does not fit."""
    values = dict(parse(name, env.default_params, word, words) for word in words)
    params = replace(env.default_params, values)
    own = type(env)
    body = {"default_params": property(lambda self: params), "changed_params": values, "__module__": own.__module__}
    changed = object.__new__(type(own.__name__, (own,), body))
    vars(changed).update(vars(env))  # not copy.copy, which asks a wrapper's __getattr__ before it has an environment
    return changed


def fields(params):
    """`{name: value}` of an environment's parameters; empty where they are neither a dataclass nor a named tuple."""
    if hasattr(params, "_asdict"):
        return params._asdict()
    return {x.name: getattr(params, x.name) for x in dataclasses.fields(params)} if is_dataclass(params) else {}


def is_dataclass(params):
    """Whether parameters are an instance of a dataclass."""
    return dataclasses.is_dataclass(params) and not isinstance(params, type)


def parse(name, params, word, words):
    """`(field, value)` of a word `NAME=VALUE`, the value as `config.json` holds it; fails on one that does not fit."""
    present = fields(params)
    shown = ", ".join(f"{key}={plain(value)}" for key, value in present.items())
    can = f"these can be set: {shown}" if present else f"{name} has no parameters that can be set"
    key, equals, written = word.partition("=")
    if not equals:
        fail(f"--env-params {word}: must be NAME=VALUE; {can}")
    if key not in present:
        fail(f"--env-params {word}: {name} has no parameter {key}; {can}")
    if sum(other.partition("=")[0] == key for other in words) > 1:
        fail(f"--env-params {word}: {key} is given twice")
    kind, value = kind_of(params, key), parse_value(written)
    if not fits(kind, present[key], value):
        fail(f"--env-params {word}: {key} must be {article(kind, present[key])}; {can}")
    return key, float(value) if kind is float else value


def parse_value(written):
    """A number, a boolean or a list in Python's or JSON's notation; any other text as it is."""
    try:
        return ast.literal_eval(written.capitalize() if written in ("true", "false") else written)
    except (ValueError, SyntaxError):
        return written


def kind_of(params, key):
    """The type of a parameter: its annotation, if that is float, so that an integer default does not make it one."""
    annotated = getattr(type(params), "__annotations__", {}).get(key)
    return float if annotated in (float, "float") else type(getattr(params, key))


def fits(kind, old, value):
    """Whether `value` may replace a parameter of type `kind` whose value is `old`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind is int:
        return number and isinstance(value, int) and abs(value) < 2**31
    if kind is float:
        return number and bool(np.isfinite(np.float32(value)))
    if not hasattr(old, "dtype"):
        return False
    try:
        array = np.asarray(value)
        whole = array.dtype.kind in ("iu" if jnp.issubdtype(old.dtype, jnp.integer) else "iuf")
        return array.shape == old.shape and whole and bool(np.isfinite(array).all())
    except ValueError:  # lists of different lengths
        return False


def article(kind, old):
    """What a parameter must be, in words."""
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    array = f"a list of shape {list(getattr(old, 'shape', []))} of finite numbers"
    return words.get(kind, array if hasattr(old, "dtype") else f"left alone: a {kind.__name__} cannot be set here")


def plain(value):
    """A parameter as it is written on the command line."""
    return str(np.asarray(value).tolist() if hasattr(value, "dtype") else value).replace(" ", "")


def replace(params, values):
    """Parameters with changed values, arrays of the type that they had."""
    arrays = {key: getattr(params, key) for key in values if hasattr(getattr(params, key), "dtype")}
    values = values | {key: jnp.asarray(values[key], old.dtype) for key, old in arrays.items()}
    return params._replace(**values) if hasattr(params, "_replace") else dataclasses.replace(params, **values)
