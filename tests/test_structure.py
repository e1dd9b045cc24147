"""The compiled programs: no step of training copies the replay buffer or touches more of it than a batch.

XLA copies an array where it cannot see that an update in place is safe. On the buffer this costs nothing that a small
test would notice and everything at a million rows, so the compiled text is read, not a clock.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from cases import ALGORITHMS, CONFIGS, FUSIONS, SMALL, replace
from jax import lax, random
from jax.extend import core

from amortax.algorithms import ddpg, dqn, fqi, ppo, sac, sac_value, svg_model, td3
from amortax.common import envs

CAPACITY = 4 * 2027  # more than any other array of the programs has elements
WIDTH = 2 * 3 + 1 + 2  # a transition of Pendulum-v1
SIZES = SMALL | {"buffer_size": CAPACITY}
CONFIG = td3.Config(**SIZES)
SVG = {name: value for name, value in SIZES.items() if hasattr(svg_model.Config, name)}
SVG |= {
    "num_rollouts": 4,
    "horizon": 5,
    "num_iterations": 4,
    "iterations_per_epoch": 2,
    "model_steps": 2,
}
every_algorithm = pytest.mark.parametrize(
    ("module", "config"),
    [
        (ddpg, ddpg.Config(**SIZES, target_period=4)),
        (td3, CONFIG),
        (sac_value, sac_value.Config(**SIZES)),
        (sac, sac.Config(**SIZES)),
        (dqn, dqn.Config(**SIZES, utd_ratio=1.0, target_period=4)),
        pytest.param(svg_model, svg_model.Config(**SVG), marks=pytest.mark.slow),
        (svg_model, svg_model.Config(**SVG, noise="inferred")),
    ],
    ids=["ddpg", "td3", "sac_value", "sac", "dqn", "svg_model", "svg_model-inferred"],
)

# Opcodes that make no array of their own (what a fusion or a loop does is looked at inside), and those that write in
# place: where XLA cannot do it in place it puts a copy before. Under vmap the write into eight buffers is a scatter.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "fusion", "while", "call", "conditional"}
IN_PLACE = {"dynamic-update-slice", "scatter"}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0} | FUSIONS)  # the users' text
INSTRUCTION = re.compile(r"^\s*(ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)$")
CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


def parse(text):
    """Computations of an HLO module: `{name: [(opcode, elements of its largest array, computations called, line)]}`."""
    computations, body = {}, None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").lstrip("%").split()[0]
            body = computations[name] = []
        elif line.startswith("}"):
            body = None
        elif body is not None and line.strip():
            body.append(instruction(line.strip()))
    return computations


def instruction(line):
    """`[ROOT] name = shape opcode(operands), attributes`, where a tuple's shape stands in parentheses."""
    _, text = line.split(" = ", 1)
    end = closing_parenthesis(text) + 1 if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:].strip()
    opcode = re.match(r"[a-z][\w-]*(?=\()", text)[0]
    arrays = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w\[([\d,]*)\]", shape)]
    called = CALLED.findall(text)
    for names in BRANCHES.findall(text):
        called += [name.strip().lstrip("%") for name in names.split(",")]
    return opcode, max(arrays, default=0), called, line


def closing_parenthesis(text):
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    raise ValueError(text)


def loop_depths(computations):
    """How many loops stand around each computation: `{name: depth}`."""
    depths = {}

    def visit(name, depth):
        if depth > depths.get(name, -1):
            depths[name] = depth
            for opcode, _, called, _ in computations[name]:
                for other in called:
                    visit(other, depth + (opcode == "while"))

    for name in computations.keys() - {x for body in computations.values() for *_, called, _ in body for x in called}:
        visit(name, 0)
    return depths


def large_work(text, depth):
    """Instructions within `depth` or more loops that make an array of CAPACITY or more elements, save in place."""
    computations = parse(text)
    depths = loop_depths(computations)
    return [
        f"{name}, in {depths[name]} loops: {line[:200]}"
        for name, body in computations.items()
        for opcode, elements, _, line in body
        if depths[name] >= depth and elements >= CAPACITY and opcode not in FREE | IN_PLACE
    ]


def writes(text, depth):
    """Instructions within `depth` or more loops that write into an array of CAPACITY or more elements in place."""
    computations = parse(text)
    depths = loop_depths(computations)
    return [
        line
        for name, body in computations.items()
        for opcode, elements, _, line in body
        if depths[name] >= depth and elements >= CAPACITY and opcode in IN_PLACE
    ]


def seed_key():
    return jax.eval_shape(lambda: random.key(0))


def seed_keys():
    return jax.eval_shape(lambda: random.split(random.key(0), 8))


def assert_touches_batches_only(compiled, depth, num_seeds):
    text = compiled.as_text()
    assert writes(text, depth), "the write into the buffer was not found: the text is not what this test can read"
    assert large_work(text, depth) == []
    # the buffer of the result is the only one: neither is there room for another
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * num_seeds * CAPACITY * WIDTH


def test_train_of_eight_seeds_vmapped():
    compiled = jit(jax.vmap(lambda key: td3.train(CONFIG, key))).lower(seed_keys()).compile()
    assert_touches_batches_only(compiled, depth=1, num_seeds=8)


def test_train_of_eight_seeds_one_after_the_other():
    """The outermost loop is over seeds: there a buffer is made and put among the results, once a seed."""
    compiled = jit(lambda keys: lax.map(lambda key: td3.train(CONFIG, key), keys)).lower(seed_keys()).compile()
    assert_touches_batches_only(compiled, depth=2, num_seeds=2)


@every_algorithm
def test_epoch_of_one_seed(module, config):
    """With the state donated there is no copy at all, in a loop or out of it."""
    state = jax.eval_shape(lambda key: module.init(config, key), seed_key())
    compiled = jit(lambda state: module.epoch(config, state), donate_argnums=0).lower(state).compile()
    assert_touches_batches_only(compiled, depth=0, num_seeds=1)


@pytest.mark.parametrize(("module", "config"), [(td3, CONFIG), (svg_model, svg_model.Config(**SVG, noise="inferred"))])
def test_epoch_of_eight_seeds_vmapped(module, config):
    states = jax.eval_shape(jax.vmap(lambda key: module.init(config, key)), seed_keys())
    compiled = jit(jax.vmap(lambda state: module.epoch(config, state)), donate_argnums=0).lower(states).compile()
    assert_touches_batches_only(compiled, depth=0, num_seeds=8)


def test_the_delayed_update_of_eight_seeds_is_left_out_where_it_is_not_due():
    """Under vmap too: the number of its loop's steps is that of all seeds, not one each with results to select from."""
    states = jax.eval_shape(jax.vmap(lambda key: td3.init(CONFIG, key)), seed_keys())
    program = jax.make_jaxpr(jax.vmap(lambda state: td3.epoch(CONFIG, state)))(states)
    targets = [x.shape for x in jax.tree.leaves(states.params.target_critic)]
    carries = lambda eqn: set(targets) <= {x.aval.shape for x in eqn.outvars}
    (loop,) = (eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "while" and carries(eqn))
    assert [x.shape for x in loop.params["cond_jaxpr"].out_avals] == [()]


def equations(jaxpr):
    """Yield the equations of a program and of the programs inside them."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


@pytest.mark.parametrize("solver", ["gradient", "lbfgs"])
def test_solvers_do_not_copy_the_weights_for_every_start(solver):
    """No array of the program is as large as the weights of two starts."""
    config = fqi.Config(maximizer=solver, num_candidates=5, maximizer_steps=3)
    params = fqi.mlp_init(random.key(0), (4, 64, 64, 1))
    obs = random.normal(random.key(1), (6, 3))
    program = jax.make_jaxpr(functools.partial(fqi.maximize, config))(params, obs, random.key(2))
    assert max(x.aval.size for eqn in equations(program.jaxpr) for x in eqn.outvars) < 2 * 64 * 64


@pytest.mark.parametrize(
    ("module", "config"),
    [
        (td3, CONFIG),
        (sac, sac.Config(**SIZES)),
        (dqn, dqn.Config(**SIZES)),
        (ppo, CONFIGS["ppo"]),
        (svg_model, svg_model.Config(**SVG)),
    ],
    ids=["td3", "sac", "dqn", "ppo", "svg_model"],
)
def test_program_for_a_gpu_stays_on_it_and_batches_its_seeds(module, config):
    """Lowered for a GPU, which need not be there: nothing calls the host, and vmapping adds no loop over seeds."""
    state = jax.eval_shape(lambda key: module.init(config, key), seed_key())
    states = jax.eval_shape(jax.vmap(lambda key: module.init(config, key)), seed_keys())
    one, eight = (
        jit(f).trace(x).lower(lowering_platforms=("cuda",)).as_text()
        for f, x in (
            (functools.partial(module.epoch, config), state),
            (jax.vmap(functools.partial(module.epoch, config)), states),
        )
    )
    assert "stablehlo.while" in one
    assert eight.count("stablehlo.while") == one.count("stablehlo.while")
    for text in (one, eight):
        assert set(re.findall("callback|infeed|outfeed|stablehlo.send|stablehlo.recv", text)) == set()
    called_back = jit(lambda x: jax.pure_callback(lambda x: x, x, x)).lower(jnp.zeros(2))
    assert "callback" in called_back.as_text()


# The reader of programs has to find what it is for


def scan_text(step):
    """Compiled text of 100 steps that start with a buffer `[CAPACITY, WIDTH]`."""
    rows = jax.ShapeDtypeStruct((CAPACITY, WIDTH), jnp.float32)
    steps = jit(lambda rows: lax.scan(step, rows, jnp.arange(100)), donate_argnums=0)
    return steps.lower(rows).compile().as_text()


def write(rows, i):
    return lax.dynamic_update_slice(rows, jnp.full((4, WIDTH), 1.0 * i), (4 * i, 0))


def read(rows, i):
    return rows[random.randint(random.key(i), (16,), 0, CAPACITY)].sum()


def read_after_write(rows, i):
    new_rows = write(rows, i)
    # what is read from the old buffer depends on the new one, so the old has to be kept
    return new_rows, read(rows, read(new_rows, i).astype(int))


def masked_write(rows, i):
    return jnp.where(jnp.arange(CAPACITY)[:, None] == i, 1.0 * i, rows), read(rows, i)


def draw_without_replacement(rows, i):
    index = random.choice(random.key(i), CAPACITY, (16,), replace=False)
    return write(rows, i), rows[index].sum()


def test_reader_accepts_a_step_in_place():
    text = scan_text(lambda rows, i: (write(rows, i), read(write(rows, i), i)))
    assert writes(text, 1)
    assert large_work(text, 1) == []


@pytest.mark.parametrize(
    ("step", "opcode"),
    [(read_after_write, " copy("), (masked_write, " select("), (draw_without_replacement, " sort(")],
)
def test_reader_finds(step, opcode):
    assert any(opcode in line for line in large_work(scan_text(step), 1))


# One program for all epochs


@pytest.mark.parametrize(
    ("name", "env"),
    [
        *(("td3", env) for env in (*envs.CONTINUOUS_ENVS, "LQR-v0")),
        *((name, "PointRobot-misc") for name in ("ddpg", "sac_value", "sac", "svg", "svg_model", "nfqca", "fqi")),
        ("shac", "Reacher-misc"),
        ("fqi", "CartPole-v1"),
        *((name, env) for name in ("reinforce", "ppo") for env in ("CartPole-v1", "PointRobot-misc")),
        *(("dqn", env) for env in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Breakout-MinAtar")),
    ],
)
def test_epoch_takes_what_it_gives(name, env):
    """`init` and `epoch` give states of the same types; gymnax's Python numbers, weakly typed, would differ."""
    module, config = ALGORITHMS[name], replace(CONFIGS[name], env=env)
    if (name, env) == ("fqi", "CartPole-v1"):
        config = replace(config, maximizer="exhaustive")
    state = jax.eval_shape(lambda key: module.init(config, key), seed_key())
    next_state, _ = jax.eval_shape(lambda state: module.epoch(config, state), state)
    assert jax.tree.structure(state) == jax.tree.structure(next_state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(next_state), strict=True):
        assert (before.shape, before.dtype, before.weak_type) == (after.shape, after.dtype, after.weak_type)


def test_epoch_compiles_once():
    config = replace(CONFIG, env="PointRobot-misc")
    state = jit(lambda key: td3.init(config, key))(random.key(0))
    # jit counts by function: a new one, for a count of its own
    epoch = jit(lambda state: td3.epoch(config, state), donate_argnums=0)
    for _ in range(3):
        state, _ = epoch(state)
    assert epoch._cache_size() == 1
