"""Experiments: each module has a dict EXPERIMENTS, which `results/reproduce.py` runs by name."""
