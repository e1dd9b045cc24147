"""Train the policies of this folder anew by the command line, measure their returns, and write README.md.

    python results/policies/make.py            all of them
    python results/policies/make.py td3 sac    some of them
    python results/policies/make.py --page     README.md only

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

from amortax.common import cli, devices, play, policy, record

HERE = Path(__file__).resolve().parent
EPISODES = 1_000  # of the measured return
FLAGS = {  # of each algorithm's command
    "fqi": "",
    "fqi_amortized": "",
    "nfqca": "",
    "ddpg": "",
    "td3": "",
    "dqn": "",
    "soft_fqi": "",
    "sac_value": "",
    "sac": "",
    "reinforce": "--env Pendulum-v1 --seed 1",
    "ppo": "--env Pendulum-v1 --total-steps 200000",
    "svg": "",
    "svg_model": "",
    "shac": "",
}
INTRODUCTION = """# Trained policies

One policy of each learning algorithm, to play, film or start from without training:

```bash
python -m amortax.common.play results/policies/td3/Pendulum-v1 --gif pendulum.gif
python algorithms/td3.py --init-from results/policies/td3/Pendulum-v1 --name continued
```

`steps` are environment steps, or the base points of the fitted-Q files; `return` is the mean of {episodes:,} greedy
episodes with its standard error, as the player prints it with `--episodes {episodes}`. The best possible mean is -137.2
on Pendulum-v1 and 500 on CartPole-v1. The final return of REINFORCE depends on the seed
([curves](../README.md#curves_pendulum)): here it is not the first one.

`python results/policies/make.py` trains all and writes this page, `python results/policies/make.py td3` trains one.
`config.json` holds hyperparameters, seed and versions. It names no source file: the player takes the algorithm of that
name from the package `amortax` as it is now.
"""


def main():
    """Command line."""
    names = [] if sys.argv[1:] == ["--page"] else sys.argv[1:] or list(FLAGS)
    for name in names:
        if name not in FLAGS:
            cli.fail(f"{name}: no such policy; there are {', '.join(FLAGS)}")
    devices.set_up_backend()
    for name in names:
        with tempfile.TemporaryDirectory() as out:
            folder = train(name, Path(out))
            measure(folder)
            print(f"{name}: {record.read_config(folder)['return']}", flush=True)
    (HERE / "README.md").write_text(page())


def train(name, out):
    """Train by the command line; the folder of the policy, which replaces the one that was there."""
    command = [sys.executable, HERE.parent.parent / "algorithms" / f"{name}.py", *FLAGS[name].split()]
    subprocess.run([*command, "--no-plot", "--keep-state", "never", "--out", out], check=True)
    (run,) = out.glob("*/*/*/seed_*")
    description = record.read_config(run)
    step = int(record.read_metrics(run)["step"][-1])
    folder = HERE / name / description["config"]["env"]
    shutil.rmtree(HERE / name, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(run / "policy.npz", folder)
    of_this_machine = ("source", "source_sha256")
    description = {key: value for key, value in description.items() if key not in of_this_machine}
    record.write_config(folder, description | {"flags": FLAGS[name], "step": step, "date": str(datetime.date.today())})
    return folder


def measure(folder):
    """Write the mean return of a policy and its standard error into its `config.json`."""
    module, config, params = policy.load(folder)
    returns = np.asarray(play.gymnax_returns(module.act, config, params, 0, jnp.arange(EPISODES)), np.float64)
    error = returns.std(ddof=1) / EPISODES**0.5
    found = {"return": round(returns.mean(), 1), "standard_error": round(error, 1)}
    record.write_config(folder, record.read_config(folder) | found)


def page():
    """The text of README.md, from the `config.json` of each policy."""
    rows = [["policy", "trained by", "seed", "steps", "return", "date"], ["---"] * 6]
    versions = set()
    for name in FLAGS:
        for path in sorted(HERE.glob(f"{name}/*/config.json")):
            x = record.read_config(path.parent)
            place = f"{name}/{path.parent.name}"
            command = " ".join(["python", f"algorithms/{name}.py", *x["flags"].split()])
            result = f"{x['return']:.1f} ± {x['standard_error']:.1f}"
            rows.append([f"[{place}]({place})", f"`{command}`", str(x["seed"]), f"{x['step']:,}", result, x["date"]])
            versions.add(", ".join(f"{package} {version}" for package, version in x["versions"].items()))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    used = "\n".join(f"Trained and measured on a CPU with {text}." for text in sorted(versions))
    return f"{INTRODUCTION.format(episodes=EPISODES)}\n{table}\n\n{used}\n"


if __name__ == "__main__":
    main()
