"""Environments that break gymnax's contract in one way each, as users' own: `--env broken_envs:NAME`."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class State(environment.EnvState):
    """A position and the time."""

    x: jax.Array


@struct.dataclass
class Params(environment.EnvParams):
    """A time limit, and how far an action moves."""

    max_steps_in_episode: int = 5
    gain: float = 1


class Whole(environment.Environment):
    """Breaks nothing: an action in [-1, 1] moves a point, which observes its place and the time."""

    default_params = Params()

    def observe_all(self, state):
        return jnp.array([state.x, state.time / 5])

    def reset_env(self, key, params):
        state = State(time=0, x=jnp.zeros(()))
        return self.observe_all(state), state

    def step_env(self, key, state, action, params):
        state = State(time=state.time + 1, x=state.x + params.gain * action[0])
        return self.observe_all(state), state, -jnp.square(state.x), jnp.array(False), {}

    def action_space(self, params):
        return spaces.Box(-1, 1, (1,))


class Swapped(Whole):
    """Changes results of `step_env` by `change(index, value)`."""

    def change(self, i, value):
        return value

    def step_env(self, key, state, action, params):
        results = super().step_env(key, state, action, params)
        return tuple(itertools.starmap(self.change, enumerate(results)))


class OwnStep(Whole):
    """Changes results of `step` in the same way."""

    def change(self, i, value):
        return value

    def step(self, key, state, action, params=None):
        results = super().step(key, state, action, params)
        return tuple(itertools.starmap(self.change, enumerate(results)))


# What makes an environment


def nothing():
    return None


def raises():
    raise KeyError("no such map")  # raised here


def asks(size):
    return Whole()


# Numbers and kinds of values


class ResetOne(Whole):
    def reset(self, key, params=None):
        return super().reset(key, params)[0]


class StepEnvFour(Whole):
    def step_env(self, key, state, action, params):
        return super().step_env(key, state, action, params)[:4]


class OldStep(Whole):
    def step(self, key, state, action, params=None):
        obs, state, reward, terminated, truncated, info = super().step(key, state, action, params)
        return obs, state, reward, terminated | truncated, info


class StepNothing(OwnStep):
    def step(self, key, state, action, params=None):
        super().step(key, state, action, params)


class InfoNone(Swapped):
    def change(self, i, info):
        return None if i == 4 else info


# Observations


class DictObs(Whole):
    def observe_all(self, state):
        return {"place": state.x[None], "time": jnp.array([state.time])}


class TupleObs(Whole):
    def observe_all(self, state):
        return state.x[None], jnp.array([state.time])


class OtherShape(Swapped):
    def change(self, i, obs):
        return obs[:1] if i == 0 else obs


class OtherType(Swapped):
    def change(self, i, obs):
        return obs.astype(int) if i == 0 else obs


class OwnStepOtherShape(OwnStep):
    def change(self, i, obs):
        return obs[:1] if i == 0 else obs


class EmptyObs(Whole):
    def observe_all(self, state):
        return jnp.zeros(0)


class ComplexObs(Whole):
    def observe_all(self, state):
        return jnp.array([state.x + 1j])


class CodeWithoutSpace(Whole):
    def observe_all(self, state):
        return jnp.int32(state.time)


class FloatForCode(Whole):
    def observe_all(self, state):
        return 1.0 * state.time + jnp.zeros(())

    def observation_space(self, params):
        return spaces.Discrete(6)


class FirstIsNaN(Whole):
    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        return obs * jnp.nan, state


class NoFinal(OwnStep):
    def change(self, i, info):
        return {} if i == 5 else info


class FinalOfOtherShape(OwnStep):
    def change(self, i, info):
        return info | {"final_observation": info["final_observation"][:1]} if i == 5 else info


# Rewards, ends, states


class RewardVector(Swapped):
    def change(self, i, reward):
        return reward[None] if i == 2 else reward


class RewardComplex(Swapped):
    def change(self, i, reward):
        return reward + 1j if i == 2 else reward


class RewardNaN(Swapped):
    def change(self, i, reward):
        return reward * jnp.nan if i == 2 else reward


class TerminatedFloat(Swapped):
    def change(self, i, terminated):
        return terminated.astype(float) if i == 3 else terminated


class TerminatedVector(Swapped):
    def change(self, i, terminated):
        return terminated[None] if i == 3 else terminated


class TruncatedInt(OwnStep):
    def change(self, i, truncated):
        return truncated.astype(int) if i == 4 else truncated


class IsTruncatedFloat(Whole):
    def is_truncated(self, state, params):
        return 1.0 * super().is_truncated(state, params)


class StateOfOtherType(Swapped):
    def change(self, i, state):
        return state.replace(x=state.x > 0) if i == 1 else state


class StateOfOtherStructure(Swapped):
    def change(self, i, state):
        return {"x": state.x, "time": state.time} if i == 1 else state


class StateWithText(Whole):
    def reset(self, key, params=None):
        obs, state = super().reset(key, params)
        return obs, {"state": state, "phase": "start"}


class NoLimit(Whole):
    default_params = Params(max_steps_in_episode=None)


# Actions


class NoActionSpace(environment.Environment):
    default_params = Params()


class DictActions(Whole):
    def action_space(self, params):
        return spaces.Dict({"left": spaces.Box(-1, 1, (1,)), "right": spaces.Box(-1, 1, (1,))})


class IntegerBox(Whole):
    def action_space(self, params):
        return spaces.Box(-3, 3, (1,), jnp.int32)


class HugeBox(Whole):
    def action_space(self, params):
        return spaces.Box(-3e38, 3e38, (1,))


class EmptyBox(Whole):
    def action_space(self, params):
        return spaces.Box(1, 1, (1,))


class OtherBounds(Whole):
    def action_space(self, params):
        return spaces.Box(-np.ones(2), np.ones(2), (3,))


# Exceptions


class Branches(Whole):
    def step_env(self, key, state, action, params):
        if state.x > 3:  # a branch
            return self.reset_env(key, params)
        return super().step_env(key, state, action, params)


class NumPy(Whole):
    def reset_env(self, key, params):
        obs, state = super().reset_env(key, params)
        return np.asarray(obs) + 1, state  # an array of NumPy


class ParamsOfNoTree(Whole):
    default_params = dataclasses.make_dataclass("Settings", ["speed"])(1)


def on_host(limit):
    """An environment that asks the host for each reward, which answers `limit` times."""
    answers = []

    def answer(x):
        answers.append(x)
        if len(answers) > limit:
            raise ConnectionError("the simulator\nis gone")  # on the host
        return np.float32(0)

    class OnHost(Swapped):
        def change(self, i, x):
            like = jax.ShapeDtypeStruct((), jnp.float32)
            return jax.pure_callback(answer, like, x, vmap_method="sequential") if i == 2 else x

    return OnHost()


def host_fails():
    return on_host(0)


def host_fails_late():
    return on_host(80)


def host_fails_in_the_third_step():
    return on_host(3)


# What breaks nothing, and is told, or not


class CopyOfOther(OwnStep):
    def change(self, i, obs):
        return obs + 100 if i == 0 else obs

    def reset(self, key, params=None):
        obs, state = super().reset(key, params)
        return obs + 100, state


class Endless(Swapped):
    def change(self, i, reward):
        return jnp.ones(()) if i == 2 else reward

    def is_truncated(self, state, params):
        return jnp.array(False)
