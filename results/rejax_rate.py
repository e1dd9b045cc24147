"""Updates/s of rejax's TD3 or SAC on Pendulum-v1, batch 256, one update for each environment step.

In an environment of its own, `pip install rejax==0.1.3 gymnax==0.0.9`:
    python results/rejax_rate.py {TD3,SAC} STEPS SEEDS BUFFER HIDDEN
"""

import sys
import time

import flax.linen as nn
import jax
import numpy as np
import rejax

WARMUP = 1000

name, steps, seeds, capacity, hidden = sys.argv[1], *map(int, sys.argv[2:6])
algorithm = getattr(rejax, name).create(
    env="Pendulum-v1",
    total_timesteps=steps,
    eval_freq=steps,
    buffer_size=capacity,
    fill_buffer=WARMUP,
    batch_size=256,
    num_envs=1,
    num_epochs=1,
    learning_rate=1e-3,
    gamma=0.99,
    polyak=0.98,
    skip_initial_evaluation=True,
)
wide = {"hidden_layer_sizes": (hidden, hidden), "activation": nn.relu}
algorithm = algorithm.replace(actor=algorithm.actor.clone(**wide), critic=algorithm.critic.clone(**wide))
keys = jax.random.split(jax.random.PRNGKey(0), seeds)
run = jax.jit(jax.vmap(algorithm.train)) if seeds > 1 else jax.jit(lambda k: algorithm.train(k[0]))
compiled = run.lower(keys).compile()
best = np.inf
for _ in range(2):
    start = time.perf_counter()
    jax.block_until_ready(compiled(keys))
    best = min(best, time.perf_counter() - start)
print(f"rejax {name} {(steps - WARMUP) * seeds / best:.0f} updates/s")
