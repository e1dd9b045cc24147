"""Train the policies of this folder anew by the command line, measure their returns, and write README.md.

    python results/policies/make.py                    all of them
    python results/policies/make.py td3/Pendulum-v1    some of them
    python results/policies/make.py --page             README.md only
    python results/policies/make.py --film             only ../figures/film_walker.gif, eight seconds of WalkerWalk

Each is `<algorithm>/<env>/policy.npz`, and `config.json` beside it says how it was trained, without the `source` of a
run: the player takes the algorithm of that name.
"""

import datetime
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from jax import numpy as jnp

from amortax.common import cli, devices, film, play, policy, record

HERE = Path(__file__).resolve().parent
EPISODES, PHYSICS_EPISODES = 1_000, 100  # of the measured return
# on the Control Suite
NETWORKS = "--hidden-sizes 256 256 --tau 0.005 --num-eval-episodes 8"
LENGTH = "--total-steps 100000 --learning-starts 4000 --steps-per-epoch 12000"
FLAGS = {  # of each policy's command
    "fqi/Pendulum-v1": "",
    "fqi_amortized/Pendulum-v1": "",
    "nfqca/Pendulum-v1": "",
    "ddpg/Pendulum-v1": "",
    "td3/Pendulum-v1": "",
    "dqn/CartPole-v1": "",
    "soft_fqi/Pendulum-v1": "",
    "sac_value/Pendulum-v1": "",
    "sac/Pendulum-v1": "",
    "reinforce/Pendulum-v1": "--env Pendulum-v1 --seed 1",
    "ppo/Pendulum-v1": "--env Pendulum-v1 --total-steps 200000",
    "svg/Pendulum-v1": "",
    "svg_model/Pendulum-v1": "",
    "shac/Pendulum-v1": "",
    "sac/playground.CartpoleSwingup": "--env playground/CartpoleSwingup --env-params action_repeat=8 --tau 0.005"
    " --num-eval-episodes 8 --total-steps 12480 --learning-starts 1000 --steps-per-epoch 2296",
    "sac/playground.WalkerWalk": f"--env playground/WalkerWalk {NETWORKS} {LENGTH}",
    "sac/playground.CheetahRun": f"--env playground/CheetahRun {NETWORKS} {LENGTH}",
}
INTRODUCTION = """# Trained policies

A policy of each learning algorithm, and of SAC on the Control Suite, to play, film or start from without training:

```bash
python -m amortax.common.play results/policies/td3/Pendulum-v1 --gif pendulum.gif
python algorithms/td3.py --init-from results/policies/td3/Pendulum-v1 --name continued
```

The Control Suite needs an extra, `pip install -e ".[playground]"`.

`steps` are environment steps, or the base points of the fitted-Q files; `return` is the mean of {episodes:,} greedy
episodes ({physics:,} on the Control Suite) with its standard error, as the player prints it with
`--episodes {episodes}`. The best possible mean is -137.2 on Pendulum-v1, 500 on CartPole-v1 and 1,000 on the Control
Suite. The final return of REINFORCE depends on the seed ([curves](../README.md#curves_pendulum)): here it is not the
first one.

`python results/policies/make.py` trains all and writes this page, with a name of the table only that one. `config.json`
holds hyperparameters, seed and versions. It names no source file: the player takes the algorithm of that name from the
package `amortax` as it is now.
"""


def main():
    """Command line."""
    if sys.argv[1:] == ["--film"]:
        record.write_atomic(HERE.parent / "figures" / "film_walker.gif", draw("sac/playground.WalkerWalk"))
        return
    names = [] if sys.argv[1:] == ["--page"] else sys.argv[1:] or list(FLAGS)
    for name in names:
        if name not in FLAGS:
            cli.fail(f"{name}: no such policy; there are {', '.join(FLAGS)}")
    devices.set_up_backend()
    for name in names:
        with tempfile.TemporaryDirectory() as out:
            train(name, Path(out))
            measure(HERE / name)
            print(f"{name}: {record.read_config(HERE / name)['return']}", flush=True)
    (HERE / "README.md").write_text(page())


def train(name, out):
    """Train by the command line, and replace the policy that was there."""
    command = [sys.executable, HERE.parent.parent / "algorithms" / f"{algorithm_of(name)}.py", *FLAGS[name].split()]
    subprocess.run([*command, "--no-plot", "--keep-state", "never", "--out", out], check=True)
    (run,) = out.glob("*/*/*/seed_*")
    description = record.read_config(run)
    step = int(record.read_metrics(run)["step"][-1])
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(run / "policy.npz", folder)
    of_this_machine = ("source", "source_sha256")
    description = {key: value for key, value in description.items() if key not in of_this_machine}
    record.write_config(folder, description | {"flags": FLAGS[name], "step": step, "date": str(datetime.date.today())})


def algorithm_of(name):
    """The algorithm of a policy."""
    return name.partition("/")[0]


def measure(folder):
    """Write the mean return of a policy and its standard error into its `config.json`."""
    module, config, params = policy.load(folder)
    episodes = jnp.arange(PHYSICS_EPISODES if "/" in config.env else EPISODES)
    returns = np.asarray(play.gymnax_returns(module.act, config, params, 0, episodes), np.float64)
    error = returns.std(ddof=1) / len(returns) ** 0.5
    found = {"return": round(returns.mean(), 1), "standard_error": round(error, 1)}
    record.write_config(folder, record.read_config(folder) | found)


def draw(name):
    """The first eight seconds of an episode as the bytes of a GIF."""
    module, config, params = policy.load(HERE / name)
    _, frames = play.gymnax_film(module.act, config, params, 0)
    shown = (frame.convert("RGB").resize((240, 180)) for frame in frames[: 8000 // film.FRAME_MS])
    return film.encode_gif([film.to_frame(np.asarray(frame)) for frame in shown])


def page():
    """The text of README.md, from the `config.json` of each policy."""
    rows = [["policy", "trained by", "seed", "steps", "return", "date"], ["---"] * 6]
    versions = set()
    for name in FLAGS:
        x = record.read_config(HERE / name)
        command = " ".join(["python", f"algorithms/{algorithm_of(name)}.py", *x["flags"].split()])
        result = f"{x['return']:.1f} ± {x['standard_error']:.1f}"
        rows.append([f"[{name}]({name})", f"`{command}`", str(x["seed"]), f"{x['step']:,}", result, x["date"]])
        versions.add(", ".join(f"{package} {version}" for package, version in x["versions"].items()))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    used = "\n".join(f"Trained and measured on a CPU with {text}." for text in sorted(versions))
    return f"{INTRODUCTION.format(episodes=EPISODES, physics=PHYSICS_EPISODES)}\n{table}\n\n{used}\n"


if __name__ == "__main__":
    main()
