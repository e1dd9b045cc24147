"""The benchmark: its group `gpu`, at small sizes on a CPU, what it asks of peers, and where it was measured."""

import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from benchmark import benchmark


def small(monkeypatch):
    """One case of two runs."""
    fields = {"hidden_sizes": [8, 8], "batch_size": 8, "steps_per_epoch": 64, "num_eval_episodes": 1}
    fields |= {"learning_starts": 64, "total_steps": 6400, "buffer_size": 1000, "utd_ratio": 0.5}
    monkeypatch.setattr(benchmark, "GPU", (("Pendulum-v1", ("td3",), fields, (1, 2)),))


def test_rows_without_a_gpu_have_no_numbers(monkeypatch):
    small(monkeypatch)
    rows = list(benchmark.measure_gpu(1, {}))
    assert [row["what"] for row in rows] == ["Pendulum-v1, 1 seed", "Pendulum-v1, 2 seeds"]
    assert {(row["measured"], row["value"]) for row in rows} == {("not measured", None)}


@pytest.mark.slow
def test_commands_of_the_gpu_run(monkeypatch):
    """On the CPU, which says that it is a GPU."""
    small(monkeypatch)
    device = {"platform": "gpu", "kind": "a device", "precision": "highest"}
    monkeypatch.setattr(benchmark, "answer", lambda command: device)
    one, two = benchmark.measure_gpu(1, {})
    assert re.fullmatch(r"[\d,]+ steps/s", one["measured"])
    assert one["value"] > 0 < two["value"]
    assert re.fullmatch(r"a device, precision of products: highest; \d+% of the time in updates", one["beside"])
    assert two["beside"] == "a device, precision of products: highest"


def test_workers_know_the_environments_of_the_physics_engines():
    """In a process that has imported nothing else."""
    text = "import benchmark, gymnax; benchmark.load('td3'); print(*gymnax.registered_envs)"
    names = subprocess.check_output([sys.executable, "-c", text], cwd=benchmark.FOLDER, text=True).split()
    assert {"playground/CheetahRun", "brax/hopper"} <= {*names}


@pytest.mark.slow
def test_evaluations_of_a_command_have_times_and_returns():
    """The end of the generator ends the command."""
    flags = "--total-steps 200 --learning-starts 100 --steps-per-epoch 50 --hidden-sizes 8 --num-eval-episodes 2"
    (early, first), (late, second) = benchmark.evaluations("td3", 0, *flags.split())
    assert 0 < early <= late
    assert -2000 < min(first, second) <= max(first, second) < 0
    assert benchmark.seconds_until(-3000, [(early, first)]) == early
    assert benchmark.seconds_until(0, [(early, first)]) == float("inf")


@pytest.mark.quick
def test_returns_on_a_task_beside_those_of_peers(monkeypatch):
    """Two seeds, of which one never reaches the second peer's mean, 20."""
    ours = {0: [(10, 5.0), (30, 25.0)], 1: [(20, 10.0), (50, 15.0)]}
    theirs = {"sbx": {"return": 10.0, "seconds": 75.0}, "sb3": {"return": 20.0, "seconds": 80.0}}
    monkeypatch.setattr(benchmark, "all_evaluations", lambda name, flags, seed: ours[seed])
    monkeypatch.setattr(benchmark, "peer_returns", lambda pythons, peer, name, steps, options, seed: theirs[peer])
    rows = list(benchmark.measure_physics_returns(1, {"sbx": "python", "sb3": "python"}))
    assert [row["algorithm"] for row in rows] == ["sac"] * 4 + ["td3"] * 4
    assert {row["measured"] for row in rows} == {"20"}
    assert rows[0]["beside"] == "SBX, same settings: 10 after 75 s, Amortax there after 25 s"
    assert rows[0]["ratio"] == 3
    assert rows[3]["beside"] == "Stable-Baselines3, its defaults: 20 after 80 s, Amortax not there with every seed"
    assert rows[3]["ratio"] == 0


@pytest.mark.quick
def test_best_returns_beside_those_of_peers(monkeypatch):
    """Their last evaluations; the flags are those of the learning curves."""
    called = []

    def all_evaluations(name, flags, seed):
        called.append((name, flags.split()))
        return [(10, 5.0), (30, 100.0 * (seed > 8))]

    def peer_returns(pythons, peer, name, steps, options, seed):
        assert (peer, name, steps) in (("sb3", "dqn", 50_000), ("purejaxrl", "ppo", 1_966_080))
        return {"return": float(seed), "seconds": 1.0}

    monkeypatch.setattr(benchmark, "all_evaluations", all_evaluations)
    monkeypatch.setattr(benchmark, "peer_returns", peer_returns)
    dqn, ppo = benchmark.measure_returns(1, {"sb3": "python", "purejaxrl": "python"})
    assert [name for name, _ in called] == ["dqn"] * 12 + ["ppo"] * 12
    assert {"CartPole-v1", "49960"} < {*called[0][1]}
    assert {"Breakout-MinAtar", "1966080"} < {*called[-1][1]}
    assert dqn["value"] == pytest.approx(0)  # of seeds 0 to 8 and three of return 100, the middle six
    assert "rl-zoo's settings: 5.5 (interquartile mean of 12 seeds" in dqn["beside"]
    assert ppo["beside"].startswith("PureJaxRL, its settings for MinAtar, while it trains: 5.5")


@pytest.mark.quick
def test_each_seed_has_a_core_and_waits_until_it_is_free(monkeypatch):
    monkeypatch.setattr(benchmark.os, "cpu_count", lambda: 2)
    assert benchmark.each_seed(benchmark.single_core) == [("taskset", "--cpu-list", core) for core in "01"]
    assert benchmark.single_core(3) == ("taskset", "--cpu-list", "1")
    busy = [threading.Lock(), threading.Lock()]

    def measure(seed):
        assert busy[seed % 2].acquire(blocking=False)
        time.sleep(0.05 if seed == 0 else 0)
        busy[seed % 2].release()
        return seed

    assert benchmark.each_seed(measure, 5) == [0, 1, 2, 3, 4]


def test_a_peer_that_hangs_ends_the_benchmark(monkeypatch):
    """One that is ready, and never answers."""
    monkeypatch.setattr(benchmark, "LIMIT", 0.1)
    hanging = [sys.executable, "-c", "import time; print('{}', flush=True); time.sleep(60)"]
    with pytest.raises(SystemExit, match=f"ended with exit code -{signal.SIGKILL}"):
        benchmark.take_turns(1, hanging)


def test_command_of_a_peer():
    command = benchmark.peer_command({"sbx": "python"}, "sbx", "sac", 500, hidden=256, returns=True)
    assert [str(word) for word in command[2:]] == ["sbx", "SAC", "--steps", "500", "--hidden", "256", "--returns"]


@pytest.mark.quick
def test_a_group_that_was_measured_elsewhere_says_so():
    measured = {"origins": {"peers": "on A", "goal": "on A", "discrete": "on B"}}
    assert benchmark.origin(measured, ("peers", "goal")) == "on A"
    assert benchmark.origin(measured, measured["origins"]) == "on A (peers, goal); on B (discrete)"


@pytest.mark.quick
def test_tables_of_a_first_measurement_of_one_group():
    measured = {"groups": {"gpu": []}, "origins": {"gpu": "5 turns on A"}, "peers": {}}
    assert "`python results/benchmark/benchmark.py --peers FOLDER`: 5 turns on A." in benchmark.table(measured)
    assert benchmark.short_table(measured)[1] == "|---|---|---|---|---|---|"
