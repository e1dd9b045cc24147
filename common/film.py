"""Films: frames of an episode, drawn by Gymnasium, by the environment itself, as grids or as curves, and their GIFs."""

import io

import gymnax
import jax
import numpy as np
from PIL import Image, ImageColor

from amortax.common import envs
from amortax.common.cli import fail

FRAME_MS = 50  # one frame per step, in which Pendulum-v1 moves in real time; physics engines are always in real time

# the state that Gymnasium renders, by gymnax's names
GYMNASIUM_STATE = {
    "CartPole-v1": ("x", "x_dot", "theta", "theta_dot"),
    "Pendulum-v1": ("theta", "theta_dot"),
    "Acrobot-v1": ("joint_angle1", "joint_angle2", "velocity_1", "velocity_2"),
    "MountainCar-v0": ("position", "velocity"),
    "MountainCarContinuous-v0": ("position", "velocity"),
}
GRID_SIZE = 400  # pixels of the longer side of a grid, about
# of the channels of a grid, the first at the bottom; color-blind safe (Tol)
CHANNELS = (
    "#EE7733",
    "#0077BB",
    "#33BBEE",
    "#CC3311",
    "#009988",
    "#EE3377",
    "#BBBBBB",
    "#DDAA33",
    "#AA4499",
    "#FFFFFF",
)


def draw(name, env_states, obs, rewards):
    """Frames of the gymnax environment `name` for its states, their observations `[n, ...]` and rewards `[n]`."""
    env, env_params = gymnax.make(name)
    if name in GYMNASIUM_STATE:
        return draw_as_gymnasium(name, env_states)
    if hasattr(env, "pose"):
        return draw_mujoco(env, env_states)
    if hasattr(env, "render"):
        return [draw_itself(env, env_params, env_state) for env_state in env_states]
    if obs.ndim in (3, 4) and min(obs.shape[1:3]) > 3:  # a smaller one is no picture
        return draw_grids(obs)
    return draw_observations(name, obs, rewards)


def draw_as_gymnasium(name, env_states):
    """Frames of gymnax states, rendered by Gymnasium's environment of the same name."""
    env = envs.make_gymnasium(name, "rgb_array")
    env.reset()
    frames = []
    for env_state in env_states:
        env.unwrapped.state = np.array([getattr(env_state, field) for field in GYMNASIUM_STATE[name]], float)
        env.unwrapped.last_u = getattr(env_state, "last_u", None)  # the torque, which Pendulum-v1 draws as an arrow
        frames.append(to_frame(env.render()))
    env.close()
    return frames


def draw_itself(env, env_params, env_state):
    """A frame by the environment's own `render(state, env_params) -> (figure, axes)`, which PointRobot-misc has."""
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")  # there may be no screen
    figure, _ = env.render(env_state, env_params)
    figure.canvas.draw()
    frame = to_frame(np.array(figure.canvas.buffer_rgba())[..., :3])
    plt.close(figure)
    return frame


def draw_grids(obs):
    """Frames of grids `[n, height, width]` or `[n, height, width, channels]`: a color per channel on black."""
    layers = np.abs(np.asarray(obs, float)).reshape(*obs.shape[:3], -1)
    layers = layers / max(1, layers.max())
    colors = [np.array(ImageColor.getrgb(color)) for color in (CHANNELS if layers.shape[-1] > 1 else CHANNELS[-1:])]
    pages = np.zeros((*obs.shape[:3], 3))
    for k in range(layers.shape[-1]):
        layer = layers[..., k, None]
        pages = (1 - layer) * pages + layer * colors[k % len(colors)]
    scale = max(1, GRID_SIZE // max(obs.shape[1:3]))
    return [to_frame(page.repeat(scale, axis=0).repeat(scale, axis=1)) for page in pages.astype(np.uint8)]


def draw_mujoco(env, env_states):
    """Frames of states of a physics engine, rendered by MuJoCo without a screen, in real time."""
    import mujoco

    try:
        renderer = mujoco.Renderer(env.model, height=240, width=320)
    except Exception as error:  # whatever a library that is missing or has no device leads to
        hint = "install EGL or OSMesa, such as apt install libegl1 libgl1-mesa-dri, or libosmesa6 with MUJOCO_GL=osmesa"
        fail(f"--gif: MuJoCo found no renderer ({type(error).__name__}: {error}); {hint}")
    data, frames = mujoco.MjData(env.model), []
    for env_state in env_states[:: max(1, round(FRAME_MS / 1000 / env.seconds))]:
        for name, value in env.pose(env.restored(env_state.leaves, jax.random.key(0))).items():
            getattr(data, name)[:] = value
        mujoco.mj_forward(env.model, data)
        renderer.update_scene(data, camera=0 if env.model.ncam else -1)
        frames.append(to_frame(renderer.render()))
    renderer.close()
    return frames


def draw_observations(name, obs, rewards):
    """Frames of an environment that cannot be rendered: curves of `obs [n, ...]` and `rewards [n]`, a moving cursor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    lines = upper.plot(obs.reshape(len(obs), -1))[:12]  # more would not fit into the legend
    upper.legend(lines, range(len(lines)), fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    upper.set(title=name, ylabel="observation")
    lower.plot(rewards, color="black")
    lower.set(xlabel="step", ylabel="reward")
    canvas.draw()
    page = np.array(canvas.buffer_rgba())[..., :3]
    frames = []
    for i in range(len(obs)):  # the page is drawn once: only the cursor differs between frames
        frame, x = page.copy(), round(float(lower.transData.transform((i, 0))[0]))
        frame[:, x : x + 2] = (214, 39, 40)
        frames.append(to_frame(frame))
    return frames


def to_frame(pixels):
    """Bytes `[height, width, 3]` as an image of 32 colors, which takes a third of the memory."""
    # octree: Pillow's default, median cut, takes six times as long
    return Image.fromarray(pixels).quantize(32, method=Image.Quantize.FASTOCTREE)


def encode_gif(frames):
    """The bytes of a looping GIF; repeated frames are merged into a longer one."""
    data = io.BytesIO()
    frames[0].save(data, format="GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    return data.getvalue()
