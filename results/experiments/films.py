"""Films of trained policies: the numbers are the states of a greedy episode, the film is Gymnasium drawing them."""

from types import SimpleNamespace

import study
from curves import runs
from PIL import Image
from study import Experiment, short

from common import play, record

SIZE = {"Pendulum-v1": (240, 240), "MountainCarContinuous-v0": (360, 240)}  # pixels
FIELDS = {env: (*names, *["last_u"] * (env == "Pendulum-v1")) for env, names in play.GYMNASIUM_STATE.items()}
EPISODE = 0


def states(run):
    """A row for each state of a greedy episode of the policy that the run's seed 0 has trained."""
    module, config, params = record.load_policy(record.seed_folder(study.train(run), 0))
    *shown, last = play.gymnax_episode(module.act, config, params, EPISODE)
    fixed = {"env": run.env, "algorithm": run.algorithm, "return": short(last.total)}
    return [fixed | {name: short(getattr(s.env_state, name)) for name in FIELDS[run.env]} for s in shown]


def draw(rows):
    """The film as the bytes of a GIF."""
    env = rows[0]["env"]
    frames = play.draw_as_gymnasium(env, [SimpleNamespace(**row) for row in rows])
    small = (frame.convert("RGB").resize(SIZE[env], Image.Resampling.LANCZOS) for frame in frames)
    return play.encode_gif([frame.quantize(32, method=Image.Quantize.FASTOCTREE) for frame in small])


def report(rows):
    """What is seen."""
    row = rows[0]
    return f"The greedy policy of {row['algorithm']}, seed 0, in {len(rows)} steps: return {row['return']:.1f}."


def experiment(env):
    """A film of DDPG, which learns both environments, trained as for its learning curve."""
    return Experiment(
        title=f"A trained policy on {env}",
        cells={"ddpg": runs(env)["ddpg"]._replace(seeds=1)},
        measure=states,
        report=report,
        draw=draw,
        quick=study.smaller,
        sources=("films",),
        sample="1 episode of 1 seed",
        picture="gif",
    )


EXPERIMENTS = {
    "film_pendulum": experiment("Pendulum-v1"),
    "film_mountain_car": experiment("MountainCarContinuous-v0"),
}
