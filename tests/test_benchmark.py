"""The benchmark's group `gpu`, at small sizes on a CPU."""

import re

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
