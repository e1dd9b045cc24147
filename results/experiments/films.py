"""Films of trained policies: the rows are the states of a greedy episode, which Gymnasium draws."""

from types import SimpleNamespace

from PIL import Image

from amortax.common import film, play, policy, record
from experiments import training
from experiments.curves import runs
from experiments.study import Experiment, short

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


EXPERIMENTS = {
    "film_pendulum": experiment("Pendulum-v1"),
    "film_mountain_car": experiment("MountainCarContinuous-v0"),
}
