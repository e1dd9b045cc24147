"""The DeepMind Control Suite of MuJoCo Playground as gymnax environments, such as `playground/CheetahRun`.

Importing this module registers them; the extra `playground` is needed to make one. All episodes take 1,000 steps. An
action repeat, as published tables often use, is `gymnax.make("playground/CheetahRun", action_repeat=2)`.

Source: Zakka et al., "MuJoCo Playground" (arXiv 2502.08844, 2025).
"""

import functools

import gymnax
import jax
import numpy as np

from amortax.common import physics

TASKS = (
    *("AcrobotSwingup", "AcrobotSwingupSparse", "BallInCup", "CartpoleBalance", "CartpoleBalanceSparse"),
    *("CartpoleSwingup", "CartpoleSwingupSparse", "CheetahRun", "FingerSpin", "FingerTurnEasy", "FingerTurnHard"),
    *("FishSwim", "HopperHop", "HopperStand", "HumanoidRun", "HumanoidStand", "HumanoidWalk", "PendulumSwingup"),
    *("PointMass", "ReacherEasy", "ReacherHard", "SwimmerSwimmer6", "WalkerRun", "WalkerStand", "WalkerWalk"),
)
ENVS = tuple(f"playground/{task}" for task in TASKS)
# what MuJoCo's next step reads of a state (its mjSTATE_INTEGRATION); all else follows from it
INTEGRATED = (
    *("time", "qpos", "qvel", "act", "history", "qacc_warmstart", "plugin_state", "ctrl", "qfrc_applied"),
    *("xfrc_applied", "eq_active", "mocap_pos", "mocap_quat", "userdata"),
)


class Playground(physics.Physics):
    """A task of the Control Suite, simulated by MJX on any device."""

    def __init__(self, task, low, high, blank, **options):
        super().__init__(task, low, high, **options)
        self.model, self.blank = task.mj_model, blank
        self.seconds = task.dt

    def pack(self, state):
        """The state with the data that the next step reads."""
        return state.replace(data={name: getattr(state.data, name) for name in INTEGRATED if hasattr(state.data, name)})

    def unpack(self, packed):
        """The state with all data, zero where the next step does not read them."""
        return packed.replace(data=self.blank.replace(**packed.data))

    def pose(self, state):
        """What MuJoCo draws."""
        return {name: getattr(state.data, name) for name in ("qpos", "qvel", "mocap_pos", "mocap_quat")}


@functools.cache
def make(task, action_repeat=1):
    """The task as a gymnax environment, the same object each time, so that it is traced once."""
    package, mjx, mujoco = physics.load("playground", "mujoco_playground", "mujoco.mjx", "mujoco")
    mujoco.set_mju_user_warning(lambda text: None)  # of deprecated words in a task's model; else it writes a file
    with jax.ensure_compile_time_eval():
        try:  # the default engine, Warp, is for NVIDIA's GPUs only
            loaded = package.dm_control_suite.load(task, config_overrides={"impl": "jax"})
        except AttributeError as error:  # so do the Reacher tasks with mujoco 3.17
            raise ImportError(f"{error}; {physics.reinstall('playground')}") from error
        finally:
            mujoco.set_mju_user_warning(None)
        blank = jax.device_get(mjx.make_data(loaded.mj_model, impl="jax"))
    model = loaded.mj_model
    low, high = np.where(model.actuator_ctrllimited, model.actuator_ctrlrange.T, [[-1.0], [1.0]])
    differentiable = model.opt.iterations == 1  # more are a while loop, which has no derivative in reverse mode
    return Playground(loaded, low, high, blank, differentiable=differentiable, action_repeat=action_repeat)


for env_id, task in zip(ENVS, TASKS, strict=True):
    if env_id not in gymnax.registered_envs:
        gymnax.register(env_id, functools.partial(make, task))
