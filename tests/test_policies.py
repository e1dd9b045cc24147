"""The policies of `results/policies`: each plays well as it stands, on any machine, and is listed with its command."""

import json
import re
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from cases import ALGORITHMS
from pages import ROOT
from policies import make

from amortax.common import play, policy, record

FOLDER = ROOT / "results" / "policies"
FOLDERS = {str(path.parent.relative_to(FOLDER)): path.parent for path in sorted(FOLDER.glob("*/*/policy.npz"))}
# mean returns; an untrained policy has -1200, 20, 20 to 170 and 40, and on CheetahRun one of 16,000 steps 31 to 111
LEAST = {"Pendulum-v1": -300, "CartPole-v1": 400, "playground.CartpoleSwingup": 700}
LEAST |= {"playground.WalkerWalk": 700, "playground.CheetahRun": 450}


@pytest.mark.parametrize("name", FOLDERS)
def test_policy_plays_well(name):
    """And it is found and loaded without a note."""
    if "playground" in name:
        pytest.importorskip("mujoco_playground")
    module, config, params = policy.load(policy.find_seed(FOLDERS[name]))
    returns = np.asarray(play.gymnax_returns(module.act, config, params, 0, jnp.arange(8)))
    assert returns.mean() > LEAST[FOLDERS[name].name]


@pytest.mark.quick
def test_policies_are_small_and_name_no_place():
    assert {name.partition("/")[0] for name in FOLDERS} == {*ALGORITHMS}
    assert {path.name for folder in FOLDERS.values() for path in folder.iterdir()} == {"config.json", "policy.npz"}
    for name, folder in FOLDERS.items():
        text = (folder / "config.json").read_text()
        description = json.loads(text)
        env = description["config"]["env"]
        assert f"{description['algorithm']}/{env.replace('/', '.')}" == name
        assert not re.search(r'"[^"]*(/|\\)[^"]*"', text.replace(env, ""))
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.npz")) < 5e6


@pytest.mark.quick
def test_page_is_that_of_the_policies():
    assert (FOLDER / "README.md").read_text() == make.page()
    assert sorted(make.FLAGS) == sorted(FOLDERS)
    for name, folder in FOLDERS.items():
        description = record.read_config(folder)
        assert description["flags"] == make.FLAGS[name]
        assert description["return"] > LEAST[folder.name]


def test_play_says_nothing_but_the_return(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["play", str(FOLDERS["td3/Pendulum-v1"]), "--episodes", "8"])
    play.main()
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("Pendulum-v1 (gymnax), 8 episodes: return -")


@pytest.mark.quick
def test_unknown_policy_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["make.py", "td4/Pendulum-v1"])
    with pytest.raises(SystemExit) as end:
        make.main()
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: td4/Pendulum-v1: no such policy; there are fqi/Pendulum-v1, ")
