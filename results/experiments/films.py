"""Films: of trained policies, whose rows are the states of a greedy episode, and of a Q-function during training."""

import io
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from amortax.algorithms import fqi
from amortax.common import film, play, policy, record
from experiments import drawing, training
from experiments.amortization_gap import objective
from experiments.curves import runs
from experiments.study import Experiment, short
from experiments.training import Run

SIZE = {"Pendulum-v1": (240, 240), "MountainCarContinuous-v0": (360, 240)}  # pixels
FIELDS = {env: (*names, *["last_u"] * (env == "Pendulum-v1")) for env, names in film.GYMNASIUM_STATE.items()}
EPISODE = 0


def measure(run):
    """A row for each state of a greedy episode of seed 0."""
    module, config, params = policy.load(record.seed_folder(training.train(run), 0))
    *shown, last = play.gymnax_episode(module.act, config, params, EPISODE)
    fixed = {"env": run.env, "algorithm": run.algorithm, "return": short(last.total)}
    return [fixed | {name: short(getattr(s.env_state, name)) for name in FIELDS[run.env]} for s in shown]


def draw(rows):
    """The film as the bytes of a GIF."""
    env = rows[0]["env"]
    frames = film.draw_as_gymnasium(env, [SimpleNamespace(**row) for row in rows])
    small = (frame.convert("RGB").resize(SIZE[env], Image.Resampling.LANCZOS) for frame in frames)
    return film.encode_gif([frame.quantize(32, method=Image.Quantize.FASTOCTREE) for frame in small])


def notes(rows):
    """Length and return."""
    row = rows[0]
    return (
        f"The greedy policy of {row['algorithm']}, seed 0, takes {len(rows)} steps; its return is {row['return']:.1f}."
    )


def experiment(env):
    """A film of DDPG, which learns both environments, trained as for its learning curves."""
    return Experiment(
        title=f"A trained policy on {env}",
        question=f"What does a trained policy do on {env}?",
        cells={"ddpg": runs(env)["ddpg"]._replace(seeds=1)},
        measure=measure,
        notes=notes,
        draw=draw,
        figure_type="gif",
        quick=training.smaller,
        sample="1 episode of 1 seed",
    )


# The landscape

ANGLES, ACTIONS = np.linspace(-np.pi, np.pi, 61), np.linspace(-1, 1, 31)
VALUES = [f"q_{i}" for i in range(len(ACTIONS))]
REPEATS = 18  # of each frame


def landscape(module, config, params):
    """For each of `ANGLES`, at rest: `(q(s, ACTIONS), the policy's action, a solver's action)`."""

    def at(angle):
        obs = jnp.stack([jnp.cos(angle), jnp.sin(angle), 0.0])
        q = objective(module, config, params, obs)
        solution = fqi.gradient_ascent(q, jnp.linspace(-1, 1, 16)[:, None], 30)
        return jax.vmap(q)(ACTIONS[:, None]), module.greedy(config, params, obs)[0], solution[0]

    return jax.vmap(at)(jnp.asarray(ANGLES))


def measure_landscape(run):
    """A row for each epoch and angle."""
    module, config = training.load(run)
    look = jax.jit(lambda params: landscape(module, config, params))
    rows = []
    for snapshot in training.snapshots(module, config, run.seeds):
        if snapshot.metrics is None:  # nothing has been learned
            continue
        fixed = {"seed": snapshot.seed, "progress": snapshot.step}
        fixed["return"] = short(np.mean(snapshot.metrics.eval_returns, dtype=np.float64))
        for angle, q, action, solution in zip(ANGLES, *map(np.asarray, look(snapshot.params)), strict=True):
            row = {"angle": short(angle), "policy": short(action), "solver": short(solution)}
            rows.append(fixed | row | dict(zip(VALUES, map(short, q), strict=True)))
    return rows


def draw_landscape(rows):
    """The film as the bytes of a GIF."""
    frames = []
    for step in sorted({row["progress"] for row in rows}):
        chosen = [row for row in rows if row["progress"] == step and row["seed"] == 0]
        q = np.array([[row[name] for name in VALUES] for row in chosen])
        page, ((axes,),) = drawing.figure(5.2, 3.2)
        loss = (q - q.max(axis=1, keepdims=True)).T
        image = axes.pcolormesh(ANGLES, ACTIONS, loss, cmap="cividis", vmin=np.quantile(loss, 0.05), vmax=0)
        page.colorbar(image, label="q(s, a) - max q(s, .)")
        column = lambda name, chosen=chosen: [row[name] for row in chosen]
        axes.plot(ANGLES, column("solver"), "o", color="black", markersize=4, label="solver")
        axes.plot(ANGLES, column("policy"), color=drawing.algorithm_color("td3"), linewidth=2.5, label="policy")
        axes.set(xlabel="angle from upright, at rest (rad)", ylabel="action", ylim=(-1.08, 1.08))
        axes.set_title(f"{step:,.0f} steps, return {chosen[0]['return']:,.0f}", fontsize="medium")
        axes.legend(loc="lower left", fontsize="small", facecolor="0.9")
        with io.BytesIO() as file:
            page.savefig(file, format="png")
            image = Image.open(file).convert("RGB")
        frames += [image.quantize(48, method=Image.Quantize.FASTOCTREE)] * REPEATS
    return film.encode_gif(frames)


EXPERIMENTS = {
    "film_pendulum": experiment("Pendulum-v1"),
    "film_mountain_car": experiment("MountainCarContinuous-v0"),
    "film_landscape": Experiment(
        title="A policy climbs its critic while the critic is learned",
        question="Where are the policy's and a solver's actions on the Q-function, over the training of TD3?",
        cells={"td3": Run("td3", "Pendulum-v1", "--steps-per-epoch 500 --num-eval-episodes 16", seeds=1)},
        measure=measure_landscape,
        notes="Each column of the picture is a state, the pendulum at rest at an angle; its color is how much worse an "
        "action is than the best of that state, for the critic that the policy ascends. The dots are the actions that "
        "gradient ascent from 16 starts finds; the line is the policy's.",
        draw=draw_landscape,
        figure_type="gif",
        quick=training.smaller,
        sources=("algorithms/fqi.py",),
        sample="1 seed",
    ),
}
