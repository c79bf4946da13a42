"""SAC+AE: continuous control from pixels, with an autoencoder that shares the critic's encoder.

Soft actor-critic learns from stacked camera frames; its convolutional encoder is trained by the critic's loss and by
reconstructing the frames, and never by the actor's loss.

Paper: Yarats et al., "Improving Sample Efficiency in Model-Free Reinforcement Learning from Images", 2019,
https://arxiv.org/abs/1910.01741

    python sac_ae_pixels.py --env cartpole-swingup --total-timesteps 100000 --bf16
    python sac_ae_pixels.py --env ball_in_cup-catch --random-shift 4 --capture-video
    python sac_ae_pixels.py --env walker-walk --run-name mine --resume

Docs: docs/sac_ae_pixels.md
"""

import contextlib
import copy
import ctypes
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import timeit
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import PIL.Image
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

with contextlib.suppress(ModuleNotFoundError):  # not on Windows
    import fcntl


@dataclass
class Args:
    """Arguments of one run. Steps are environment steps (an action repeated k times counts k) unless said otherwise."""

    exp_name: str = Path(__file__).stem
    """the name of this experiment"""
    seed: int = 1
    """seed of the experiment"""
    torch_deterministic: bool = True
    """if toggled, PyTorch uses deterministic algorithms only"""
    cuda: bool = True
    """if toggled, a GPU is used where there is one"""
    track: bool = False
    """if toggled, this experiment is tracked with Weights and Biases (WANDB_MODE=offline needs no key)"""
    wandb_project_name: str = "LatentRL"
    """the wandb project's name"""
    wandb_entity: str | None = None
    """the entity (team) of the wandb project"""
    capture_video: bool = False
    """if toggled, videos of evaluation episodes are written to the run folder's videos/"""
    runs_dir: str = "runs"
    """the folder that run folders are created in"""
    run_name: str | None = None
    """the run folder's name (default: environment, experiment, seed and time)"""
    resume: bool = False
    """if toggled, continue the run named by --run-name: from its checkpoint, or from the start if it has none"""
    checkpoint_frequency: int = 10_000
    """steps between two checkpoints"""
    eval_frequency: int = 10_000
    """steps between two evaluations"""
    eval_episodes: int = 10
    """episodes of each evaluation, always on the same seeds"""

    # Algorithm specific arguments
    env_id: Annotated[str, tyro.conf.arg(aliases=["--env"])] = "cartpole-swingup"
    """the environment: a dm_control task, or any Gymnasium id with a Box action space and rgb_array rendering"""
    total_timesteps: int | None = None
    """environment steps of the run (default: by environment)"""
    action_repeat: int | None = None
    """how many environment steps an action is repeated for (default: by environment)"""
    image_size: int = 84
    """height and width of a frame in pixels"""
    frame_stack: int = 3
    """frames in an observation"""
    camera: int = 0
    """the camera of a dm_control task"""
    render_quality: Literal["fast", "original"] = "fast"
    """dm_control's shadow map: 512 pixels wide, or as the task has it (slow where OpenGL is software)"""
    buffer_size: int | None = None
    """newest transitions (agent steps) to sample from (default: all of the run)"""
    save_replay: bool = False
    """if toggled, write replay.npz for plas_pixels.py: the frames' size again on the disk and, at the end, in memory"""
    learning_starts: int = 1_000
    """agent steps with random actions, after which that many updates are made at once"""
    batch_size: int = 128
    """transitions of one update"""
    gamma: float = 0.99
    """the discount factor gamma"""
    learning_rate: float = 1e-3
    """learning rate of the actor, the critic, the encoder and the decoder"""
    alpha_learning_rate: float = 1e-4
    """learning rate of the temperature"""
    alpha: float = 0.1
    """the temperature at the start"""
    tau: float = 0.01
    """target smoothing coefficient of the Q functions"""
    encoder_tau: float = 0.05
    """target smoothing coefficient of the encoder"""
    policy_frequency: int = 2
    """updates of the critic per update of the actor and the temperature"""
    target_network_frequency: int = 2
    """updates of the critic per update of the targets"""
    feature_dim: int = 50
    """size of the latent that the encoder makes of an observation"""
    num_layers: int = 4
    """convolutional layers of the encoder and of the decoder"""
    num_filters: int = 32
    """filters of each convolutional layer"""
    hidden_dim: int = 1_024
    """width of the two hidden layers of the actor and of each Q function"""
    reconstruction: bool = True
    """if toggled off, there is no autoencoder: the critic alone trains the encoder (SAC:pixel)"""
    latent_weight: float = 1e-6
    """weight of the penalty on the latent in the autoencoder's loss"""
    decoder_weight_decay: float = 1e-7
    """weight decay of the decoder"""
    random_shift: int = 0
    """pixels by which each sampled observation is shifted at random, as DrQ does with 4 (0: not at all)"""
    bf16: bool = False
    """if toggled, networks compute in bfloat16 (weights stay float32): faster where the processor has it"""


DEFAULTS_BY_ENVIRONMENT: dict[str, dict[str, int]] = {  # the paper's; "" holds what is not listed above it
    "finger-spin": {"action_repeat": 2, "total_timesteps": 1_000_000},
    "walker-walk": {"action_repeat": 2, "total_timesteps": 1_000_000},
    "ball_in_cup-catch": {"action_repeat": 4, "total_timesteps": 2_000_000},
    "cartpole-swingup": {"action_repeat": 8, "total_timesteps": 2_000_000},
    "reacher-easy": {"action_repeat": 4, "total_timesteps": 2_500_000},
    "cheetah-run": {"action_repeat": 4, "total_timesteps": 3_000_000},
    "": {"action_repeat": 1, "total_timesteps": 1_000_000},
}


# Environment ---------------------------------------------------------------------------------------------------------
INSTALL_OPENGL = "install it (Debian: apt-get install libegl1 libgl1-mesa-dri)"


def choose_opengl() -> str | None:
    """Tell MuJoCo how to draw without a display: EGL, else OSMesa. None if neither is there, nor needed outside Linux.

    Must come before MuJoCo is imported. A MUJOCO_GL that is set already is left as it is.
    """
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without looking for a display
    # Software OpenGL would take all cores for each picture, and fight with the networks for them.
    os.environ.setdefault("LP_NUM_THREADS", str(torch.get_num_threads()))
    for name, library in (("egl", "libEGL.so.1"), ("osmesa", "libOSMesa.so.8")):
        if "MUJOCO_GL" not in os.environ:
            with contextlib.suppress(OSError):
                ctypes.CDLL(library)
                os.environ["MUJOCO_GL"] = name
    return os.environ.get("MUJOCO_GL")


class PixelEnv(gym.Wrapper):
    """An environment as an agent with a camera sees it.

    Observations are the newest frames (3 frame_stack, S, S) uint8, an episode's first one repeated where there are not
    enough yet; actions are (A,) float32 in [-1, 1]. An action is repeated, its rewards add up.
    """

    def __init__(self, env: gym.Env, args: Args) -> None:
        """Wrap `env`. Raises ValueError if its actions do not fit."""
        super().__init__(gym.wrappers.RepeatAction(env, args.action_repeat))
        self.args, self.box, self.camera = args, env.action_space, (None, None)
        if not (isinstance(self.box, gym.spaces.Box) and self.box.is_bounded() and math.prod(self.box.shape)):
            raise ValueError(f"sac_ae_pixels needs a Box action space with bounds; {args.env_id} has {self.box}")
        self.action_dim, size = math.prod(self.box.shape), args.image_size
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,))
        self.observation_space = gym.spaces.Box(0, 255, (3 * args.frame_stack, size, size), np.uint8)
        # A dm_control task behind shimmy is drawn through dm_control itself: a camera that is kept is faster.
        self.through_dm_control = type(env.unwrapped).__name__ == "DmControlCompatibilityV0"
        observed = env.observation_space.spaces.values() if self.through_dm_control else ()
        self.has_cameras = any(len(space.shape) == 3 for space in observed)  # of the task's own, drawn at each step

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """The first observation of an episode."""
        _, info = self.env.reset(seed=seed, options=options)
        self.observation = np.concatenate([self.frame()] * self.args.frame_stack)
        return self.observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Repeat one action (A,) in [-1, 1]."""
        low, high = self.box.low.astype(float), self.box.high.astype(float)
        scaled = low + (high - low) * (action.astype(float).reshape(self.box.shape) + 1.0) / 2.0
        _, reward, terminated, truncated, info = self.env.step(scaled.clip(low, high).astype(self.box.dtype))
        self.observation = np.concatenate((self.observation[3:], self.frame()))
        return self.observation, float(reward), terminated, truncated, info

    def frame(self) -> np.ndarray:
        """What the camera sees now: (3, S, S) uint8. Raises ValueError if that is no picture."""
        image, size = self.dm_control_image() if self.through_dm_control else self.env.render(), self.args.image_size
        if not (isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] == 3):
            raise ValueError(f"a picture (height, width, 3) expected of rgb_array, got {type(image).__name__}")
        picture = PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BILINEAR)
        return np.asarray(picture).transpose(2, 0, 1)

    def dm_control_image(self) -> np.ndarray:
        """A dm_control task's picture (S, S, 3), valid until the next.

        Where OpenGL is software, most of the time goes into the shadow map and into an off-screen buffer that is larger
        than the picture. Both can be changed until the first picture is drawn; the buffer's size changes no pixel.
        """
        physics, size = self.unwrapped.physics, self.args.image_size
        if self.camera[0] is not physics:
            from dm_control.mujoco.engine import Camera

            visual, width = physics.model.vis, self.unwrapped.render_kwargs.get("width", size)
            buffer = visual.global_
            if self.args.render_quality == "fast" and not self.has_cameras:
                visual.quality.shadowsize = min(512, visual.quality.shadowsize)
                buffer.offwidth = buffer.offheight = width
            buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, width)
            self.camera = physics, Camera(physics, size, size, self.args.camera)
        return self.camera[1].render()


def make_env(args: Args, video: bool = False) -> PixelEnv:
    """Make the environment and draw a first frame. Raises ValueError with one line, if that is not possible.

    With `video`, `render()` gives larger pictures than the agent sees, where the environment can draw them.
    """
    opengl, env_id, size, options = choose_opengl(), args.env_id, max(256 * video, args.image_size), {}
    task = re.fullmatch(r"[a-z]\w*-(?!v\d+$)[a-z]\w*", env_id)
    if task or env_id.startswith("dm_control/"):
        if opengl is None and sys.platform == "linux":
            raise ValueError(f"{env_id} needs OpenGL, and neither EGL nor OSMesa is here; {INSTALL_OPENGL}")
        try:
            import shimmy  # noqa: F401  (registers dm_control's tasks)
        except Exception as error:  # it is not there, or a library of OpenGL is not as it should be
            missing = isinstance(error, ImportError) and "GL" not in str(error)
            hint = "try pip install 'shimmy[dm-control]'" if missing else f"{INSTALL_OPENGL}, or set MUJOCO_GL=osmesa"
            raise ValueError(f"{env_id} needs dm_control ({type(error).__name__}: {error}); {hint}") from None
        env_id = f"dm_control/{env_id}-v0" if task else env_id
        options = {"render_kwargs": {"width": size, "height": size, "camera_id": args.camera}}
    try:
        env = gym.make(env_id, render_mode="rgb_array", **options)
    except (gym.error.UnregisteredEnv, ModuleNotFoundError) as error:
        hint = "ids look like cartpole-swingup or package:Name-v0"
        raise ValueError(f"unknown environment {args.env_id} ({error}); {hint}") from None
    except Exception as error:  # whatever a third party's environment raises, it is about this id
        raise ValueError(f"could not make {args.env_id}: {type(error).__name__}: {error}") from None
    pixels = PixelEnv(env, args)
    try:
        pixels.reset(seed=0)
    except Exception as error:
        hint = f"; {INSTALL_OPENGL}" if "GL" in str(error) else ""
        raise ValueError(f"{args.env_id} cannot be drawn: {type(error).__name__}: {error}{hint}") from None
    return pixels


# Networks ------------------------------------------------------------------------------------------------------------
def feature_map_size(image_size: int, num_layers: int) -> int:
    """Height and width after the convolutions: the first has stride 2, all have a kernel of 3 and no padding."""
    return (image_size - 3) // 2 + 1 - 2 * (num_layers - 1)


def initialise(module: nn.Module) -> None:
    """Orthogonal linear layers; convolutions that are orthogonal in their centre and 0 around it; no bias."""
    if isinstance(module, nn.Linear):
        nn.init.orthogonal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
        nn.init.orthogonal_(module.weight.data[:, :, 1, 1], nn.init.calculate_gain("relu"))


class Output(nn.Linear):
    """A linear layer that computes in float32 whatever autocast says: values of Q need more than bfloat16's 8 bits."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, inputs) -> (B, outputs) float32."""
        with torch.autocast(inputs.device.type, enabled=False):
            return super().forward(inputs.float())


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    layers = nn.Linear(inputs, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True)
    return nn.Sequential(*layers, Output(hidden, outputs))


class Encoder(nn.Module):
    """Pixels (B, C, S, S) in [0, 1] -> latent (B, D) in (-1, 1); C = 9 for three frames, D = 50.

    Features are flattened with the channels last, which costs no copy in the memory format that is fast.
    """

    def __init__(self, channels: int, args: Args) -> None:
        """Convolutions, then one linear layer, LayerNorm and tanh."""
        super().__init__()
        filters, size = args.num_filters, feature_map_size(args.image_size, args.num_layers)
        self.convs = nn.ModuleList(
            nn.Conv2d(filters if i else channels, filters, 3, stride=1 if i else 2) for i in range(args.num_layers)
        )
        self.fc = nn.Linear(filters * size * size, args.feature_dim)
        self.ln = nn.LayerNorm(args.feature_dim)

    def copy_conv_weights_from(self, source: "Encoder") -> None:
        """Tie the convolutions to those of `source`: the same tensors from now on, not copies."""
        self.convs = source.convs

    def features(self, pixels: Tensor) -> Tensor:
        """What the convolutions make of pixels: (B, F), F = rows x columns x filters."""
        hidden = pixels
        for conv in self.convs:
            hidden = F.relu(conv(hidden), inplace=True)
        return hidden.permute(0, 2, 3, 1).flatten(1)

    def head(self, features: Tensor) -> Tensor:
        """Features (B, F) -> latent (B, D)."""
        return torch.tanh(self.ln(self.fc(features).float()))

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels -> latent."""
        return self.head(self.features(pixels))


class BiasGradient(torch.autograd.Function):
    """Hands an output (B, C, H, W) on, and the sum of its gradient to the bias (C,) that is in it already."""

    @staticmethod
    def forward(context: Any, output: Tensor, bias: Tensor) -> Tensor:
        """The output itself, so that nothing is copied."""
        context.mark_dirty(output)
        return output

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of output and bias."""
        return gradient, gradient.sum((0, 2, 3))


class Deconvolution(nn.ConvTranspose2d):
    """A transposed convolution without oneDNN's bias gradient, a third of its backward pass on CPUs."""

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H', W'), as in PyTorch's own layer."""
        bias, padding = self.bias.detach(), self.output_padding
        output = F.conv_transpose2d(inputs, self.weight, bias, self.stride, output_padding=padding)
        return BiasGradient.apply(output, self.bias)


class Decoder(nn.Module):
    """Latent (B, D) -> reconstruction (B, C, S, S), the encoder's mirror; targets are in [-0.5, 0.5)."""

    def __init__(self, channels: int, args: Args) -> None:
        """A linear layer, then transposed convolutions, the last one with stride 2."""
        super().__init__()
        filters, layers = args.num_filters, args.num_layers
        self.shape = filters, feature_map_size(args.image_size, layers)
        self.fc = nn.Linear(args.feature_dim, filters * self.shape[1] ** 2)
        self.deconvs = nn.ModuleList(Deconvolution(filters, filters, 3) for _ in range(layers - 1))
        # Stride 2 has taken an even image's last row and column: the padding gives them back.
        self.deconvs.append(Deconvolution(filters, channels, 3, stride=2, output_padding=1 - args.image_size % 2))

    def forward(self, latent: Tensor) -> Tensor:
        """The reconstruction of each latent."""
        filters, size = self.shape
        hidden = F.relu(self.fc(latent), inplace=True).view(-1, size, size, filters).permute(0, 3, 1, 2)
        for deconv in self.deconvs[:-1]:
            hidden = F.relu(deconv(hidden), inplace=True)
        return self.deconvs[-1](hidden)


LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0


def squashed_gaussian(output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A policy head's output (B, 2A) and standard normal noise (B, A) -> action (B, A), log-probability (B,), log std.

    The change of variables by tanh costs log(1 - action^2), kept finite by 1e-6 as in the original code: a form without
    that constant differs by more than 10 where actions saturate.
    """
    mean, log_std = output.chunk(2, 1)
    log_std = LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1.0)
    action = torch.tanh(mean + noise * log_std.exp())
    log_probability = -0.5 * noise.square() - log_std - 0.5 * math.log(2.0 * math.pi)
    log_probability = log_probability - torch.log(F.relu(1.0 - action.square()) + 1e-6)
    return action, log_probability.sum(1), log_std


class Actor(nn.Module):
    """The policy: its encoder has the critic's convolutions and a head of its own."""

    def __init__(self, channels: int, action_dim: int, args: Args) -> None:
        """Two hidden layers between the latent and the 2A outputs, mean and raw log standard deviation."""
        super().__init__()
        self.encoder = Encoder(channels, args)
        self.trunk = mlp(args.feature_dim, args.hidden_dim, 2 * action_dim)

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sampled action (B, A), log-probability (B,) and log standard deviation (B, A), of features (B, F).

        Where the noise is 0, the action is the mean's.
        """
        return squashed_gaussian(self.trunk(self.encoder.head(features)), noise)

    def own_parameters(self) -> list[nn.Parameter]:
        """Everything but the tied convolutions, which the actor's loss must never move."""
        return [*self.encoder.fc.parameters(), *self.encoder.ln.parameters(), *self.trunk.parameters()]


class Critic(nn.Module):
    """An encoder and two Q functions of its latent and the action."""

    def __init__(self, channels: int, action_dim: int, args: Args) -> None:
        """Two hidden layers in each Q function."""
        super().__init__()
        self.encoder = Encoder(channels, args)
        self.q1 = mlp(args.feature_dim + action_dim, args.hidden_dim, 1)
        self.q2 = mlp(args.feature_dim + action_dim, args.hidden_dim, 1)

    def forward(self, features: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Both values (B,), of features (B, F) and actions (B, A)."""
        inputs = torch.cat((self.encoder.head(features), action), 1)
        return self.q1(inputs)[:, 0], self.q2(inputs)[:, 0]


# Replay buffer -------------------------------------------------------------------------------------------------------
class Batch(NamedTuple):
    """Transitions: (B, C, S, S), (B, A), (B,), (B, C, S, S), (B,) float 0 or 1; observations are uint8 or scaled."""

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    terminated: Tensor


class ReplayBuffer:
    """Transitions in order, their frames once each, as uint8 in a memory-mapped file.

    Transition i adds one frame, what is seen after it, in slot i; an episode's first frame is in a second half of the
    slots, one for each episode and one for that which begins after the last transition. A stack is put together when it
    is sampled: frames from before the episode's start are its first frame. Slots are used in turns; the file has holes
    where nothing was written.

    There are `reserve` slots more than can be sampled: as many transitions as there are between two checkpoints do not
    touch what the last checkpoint counts on.
    """

    def __init__(self, path: Path, capacity: int, reserve: int, image_size: int, stack: int, action_dim: int) -> None:
        """Open or make the file. `capacity` is in transitions. Raises ValueError if the file was cut short."""
        self.capacity, self.slots, self.stack, self.path = capacity, capacity + reserve, stack, path
        self.frame_bytes = 3 * image_size * image_size
        self.file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        shape = 2 * self.slots + 1, 3, image_size, image_size
        found, size = os.fstat(self.file).st_size, math.prod(shape)
        if found not in (0, size):
            raise ValueError(f"{path} has {found:,} bytes instead of {size:,}")
        os.ftruncate(self.file, size)
        self.frames = torch.from_numpy(np.memmap(path, np.uint8, "r+", shape=shape))
        self.values = torch.zeros(self.slots, action_dim + 2)  # action, reward, terminated
        self.origins = torch.zeros(self.slots, 2, dtype=torch.int64)  # the episode's first transition, and its number
        self.size, self.first, self.episode = 0, 0, -1

    def write(self, slot: int, frame: np.ndarray) -> None:
        """Put a frame into the file. Raises OSError if the disk is full: a store to mapped memory would kill us."""
        if os.pwrite(self.file, frame.tobytes(), slot * self.frame_bytes) != self.frame_bytes:
            raise OSError("no space left on the disk")

    def start_episode(self, frame: np.ndarray) -> None:
        """Begin an episode with its first frame (3, S, S)."""
        self.first, self.episode = self.size, self.episode + 1
        self.write(self.slots + self.episode % (self.slots + 1), frame)

    def add(self, action: np.ndarray, reward: float, terminated: bool, next_frame: np.ndarray) -> None:
        """Append one transition of the current episode."""
        slot = self.size % self.slots
        self.write(slot, next_frame)
        self.values[slot] = torch.tensor([*action.tolist(), reward, terminated])
        self.origins[slot, 0], self.origins[slot, 1] = self.first, self.episode
        self.size += 1

    def sample(self, batch_size: int, device: torch.device) -> Batch:
        """Transitions drawn uniformly, with replacement."""
        index = torch.randint(max(0, self.size - self.capacity), self.size, (batch_size,))
        return self.gather(index, device)

    def gather(self, index: Tensor, device: torch.device) -> Batch:
        """Transitions by their number (B,) since the start."""
        row = index % self.slots
        values, (first, episode) = self.values[row].to(device), self.origins[row][:, :, None].unbind(1)
        steps = index[:, None] + torch.arange(-self.stack, 1)  # the transitions that the frames were seen after
        slots = torch.where(steps >= first, steps % self.slots, self.slots + episode % (self.slots + 1))
        frames = self.frames.index_select(0, slots.flatten()).view(len(index), -1, *self.frames.shape[2:])
        frames = frames.to(device, memory_format=torch.channels_last)  # (B, 3 (stack + 1), S, S)
        return Batch(frames[:, :-3], values[:, :-2], values[:, -2], frames[:, 3:], values[:, -1])

    def state_dict(self) -> dict[str, Any]:
        """Everything but the frames, which are on the disk when this returns."""
        os.fsync(self.file)
        values, origins = (rows[: self.size].clone() for rows in (self.values, self.origins))
        return {"size": self.size, "first": self.first, "episode": self.episode, "values": values, "origins": origins}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the frames of the file."""
        self.size, self.first, self.episode = state["size"], state["first"], state["episode"]
        self.values[: len(state["values"])] = state["values"]
        self.origins[: len(state["origins"])] = state["origins"]

    def save_episodes(self, path: Path, action_repeat: int, env_id: str) -> None:
        """Write all transitions to an npz file as plas_pixels.py reads them; nothing may have been overwritten.

        As in V-D4RL, an episode of T transitions has T + 1 rows, and row t holds the picture (S, S, 3) and what led to
        it: the action and the reward of the whole action repeat. `is_terminal` is true where the task ended, and not
        where the time did, or the run. Needs the memory of all frames at once; raises MemoryError or OSError.
        """
        values, (first, episode) = self.values[: self.size].numpy(), self.origins[: self.size].numpy().T
        starts = np.unique(first)  # each episode's first frame is a row more, before its first transition
        slots = np.insert(np.arange(self.size), starts, self.slots + episode[starts])
        values = np.insert(values, starts, 0.0, axis=0)
        is_first = np.insert(np.zeros(self.size, bool), starts, True)
        columns = {
            "image": self.frames.numpy()[slots].transpose(0, 2, 3, 1), "action": values[:, :-2],
            "reward": values[:, -2], "is_first": is_first, "is_last": np.roll(is_first, -1),
            "is_terminal": values[:, -1] > 0.0, "action_repeat": action_repeat, "frame_stack": self.stack,
            "env_id": env_id,
        }  # fmt: skip
        write_atomically(path, lambda file: np.savez(file, **columns))

    def close(self) -> None:
        """Close the file."""
        os.close(self.file)


# Learning ------------------------------------------------------------------------------------------------------------
class Noise(NamedTuple):
    """What an update draws: (B, A) and (B, A) standard normal, (B, C, S, S) uint8 uniform (None without a decoder)."""

    target: Tensor
    actor: Tensor
    dither: Tensor | None


def random_bytes(shape: torch.Size, device: torch.device) -> Tensor:
    """Uniform uint8 with the channels (dimension 1) last in memory; eight bytes a draw."""
    batch, channels, height, width = shape
    count = math.prod(shape)
    draws = torch.empty(-(-count // 8), dtype=torch.int64, device=device).random_(-(2**63), None)
    return draws.view(torch.uint8)[:count].view(batch, height, width, channels).permute(0, 3, 1, 2)


def reconstruction_target(observation: Tensor, dither: Tensor) -> Tensor:
    """uint8 pixels reduced to 5 bits, with `dither` (uint8, of 256) of a step added, in [-0.5, 0.5)."""
    levels = (observation & 248).to(torch.int16) * 32 + dither  # 256 for each of the 32 steps
    return levels.float().mul_(1.0 / 8192.0).sub_(0.5)


def random_shift(images: Tensor, pad: int, offsets: Tensor | None = None) -> Tensor:
    """Shift each image (B, C, S, S) by up to `pad` pixels, repeating its border, as DrQ does.

    `offsets` (B, 2) in 0..2 pad are drawn here if they are not given.
    """
    if offsets is None:
        offsets = torch.randint(0, 2 * pad + 1, (len(images), 2), device=images.device)
    line = torch.arange(images.shape[-1], device=images.device)
    index = (line + offsets[:, :, None] - pad).clamp_(0, len(line) - 1)  # (B, 2, S)
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    return images[rows, :, index[:, 0, :, None], index[:, 1, None, :]].permute(0, 3, 1, 2)  # channels last


def gradient_step(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
    """One step of these optimizers on `loss`; only their own parameters get gradients."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        # A fused Adam reads weights and gradients in the order of memory, so that this must be the same for both.
        same = gradient.stride() == parameter.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    for optimizer in optimizers:
        optimizer.step()


class SACAE:
    """Networks, optimizers and the updates; an update takes a batch, does one step, returns detached tensors."""

    def __init__(self, args: Args, action_dim: int, device: torch.device) -> None:
        """Build everything; `args` has no None left (see `resolve`)."""
        self.args, self.device, self.action_dim = args, device, action_dim
        channels = 3 * args.frame_stack
        self.actor, self.critic = Actor(channels, action_dim, args), Critic(channels, action_dim, args)
        self.decoder = Decoder(channels, args)
        for module in (self.actor, self.critic, self.decoder):
            module.apply(initialise)
            module.to(device, memory_format=torch.channels_last)
        self.actor.encoder.copy_conv_weights_from(self.critic.encoder)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha), device=device))

        def adam(parameters: Any, learning_rate: float = args.learning_rate, **options: Any) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, learning_rate, fused=True, **options)

        self.actor_optimizer = adam(self.actor.own_parameters())
        self.critic_optimizer = adam(self.critic.parameters())
        self.alpha_optimizer = adam([self.log_alpha], args.alpha_learning_rate, betas=(0.5, 0.999))
        # The encoder has two optimizers, each with moments of its own, as in the original code.
        self.encoder_optimizer = adam(self.critic.encoder.parameters())
        self.decoder_optimizer = adam(self.decoder.parameters(), weight_decay=args.decoder_weight_decay)
        self.encoder_pair = [list(c.encoder.parameters()) for c in (self.target_critic, self.critic)]
        self.q_pair = [[*c.q1.parameters(), *c.q2.parameters()] for c in (self.target_critic, self.critic)]

    def precision(self) -> torch.autocast:
        """The context that networks are called in: bfloat16 with `--bf16`, else float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)

    def scale(self, observation: Tensor) -> Tensor:
        """Pixels uint8 -> [0, 1], in the precision that the networks compute in."""
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        return observation.to(dtype, memory_format=torch.channels_last).div_(255.0)

    @torch.inference_mode()
    def act(self, observation: np.ndarray, sample: bool = False) -> np.ndarray:
        """Actions (N, A) for observations (N, C, S, S) uint8: the mean's, or sampled ones."""
        draw = torch.randn if sample else torch.zeros
        noise = draw(len(observation), self.action_dim, device=self.device)
        with self.precision():
            features = self.critic.encoder.features(self.scale(torch.from_numpy(observation).to(self.device)))
            return self.actor(features, noise)[0].cpu().numpy()

    @torch.no_grad()
    def critic_target(self, batch: Batch, noise: Tensor) -> Tensor:
        """Targets (B,) of both Q functions: reward and the soft value of what follows (equations 2 and 3)."""
        with self.precision():
            features = self.critic.encoder.features(batch.next_observation)
            action, log_probability, _ = self.actor(features, noise)
            target_features = self.target_critic.encoder.features(batch.next_observation)
            value = torch.minimum(*self.target_critic(target_features, action))
        value = value - self.log_alpha.exp() * log_probability
        return batch.reward + self.args.gamma * (1.0 - batch.terminated) * value

    def update_critic(self, batch: Batch, noise: Tensor) -> dict[str, Tensor]:
        """One step of the encoder and both Q functions. `batch` is scaled, `noise` (B, A) draws the next action."""
        target = self.critic_target(batch, noise)
        with self.precision():
            q1, q2 = self.critic(self.critic.encoder.features(batch.observation), batch.action)
        loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        gradient_step(loss, self.critic_optimizer)
        return {"critic": loss.detach(), "q_value": q1.detach().mean()}

    def update_actor(self, features: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """One step of the actor on detached features (B, F), then one of the temperature on the same sample."""
        with self.precision():
            action, log_probability, log_std = self.actor(features, noise)
            value = torch.minimum(*self.critic(features, action))
        alpha = self.log_alpha.exp()
        loss = (alpha.detach() * log_probability - value).mean()
        gradient_step(loss, self.actor_optimizer)
        # The target entropy is -|A|: the temperature falls while the policy's entropy is above it.
        alpha_loss = (alpha * (self.action_dim - log_probability).detach()).mean()
        gradient_step(alpha_loss, self.alpha_optimizer)
        entropy = 0.5 * self.action_dim * (1.0 + math.log(2.0 * math.pi)) + log_std.detach().sum(1).mean()
        losses = {"actor": loss, "entropy": entropy, "alpha_loss": alpha_loss, "alpha": alpha}
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update_targets(self) -> None:
        """Let the target critic follow, its encoder faster than its Q functions."""
        torch._foreach_lerp_(*self.q_pair, self.args.tau)
        torch._foreach_lerp_(*self.encoder_pair, self.args.encoder_tau)

    def update_reconstruction(self, features: Tensor, observation: Tensor, dither: Tensor) -> dict[str, Tensor]:
        """One step of encoder and decoder (equation 4), on the convolutions' features (B, F) of uint8 observations."""
        target = reconstruction_target(observation, dither)
        with self.precision():
            latent = self.critic.encoder.head(features)
            reconstruction = self.decoder(latent)
        error = F.mse_loss(reconstruction.float(), target)
        penalty = 0.5 * latent.square().sum(1).mean()
        loss = error + self.args.latent_weight * penalty
        gradient_step(loss, self.encoder_optimizer, self.decoder_optimizer)
        losses = {"autoencoder": loss, "reconstruction": error, "latent": penalty}
        return {name: value.detach() for name, value in losses.items()}

    def draw(self, batch: Batch) -> Noise:
        """The noise of one update."""
        normal = torch.randn(2, *batch.action.shape, device=self.device)
        dither = random_bytes(batch.observation.shape, self.device) if self.args.reconstruction else None
        return Noise(*normal, dither)

    def update(self, batch: Batch, actor: bool, targets: bool, noise: Noise | None = None) -> dict[str, Tensor]:
        """One update of everything, in the original's order; actor and targets only where told so.

        Actor, its Q functions and autoencoder all see the critic's new convolutions, so that one pass serves them.
        """
        args, images = self.args, (batch.observation, batch.next_observation)
        if args.random_shift:
            images = [random_shift(each, args.random_shift) for each in images]
        else:  # they are slices of longer stacks, which are slower to compute with than copies
            images = [each.contiguous(memory_format=torch.channels_last) for each in images]
        noise = noise or self.draw(batch)
        pixels, following = map(self.scale, images)
        losses = self.update_critic(batch._replace(observation=pixels, next_observation=following), noise.target)
        if actor or args.reconstruction:
            with torch.set_grad_enabled(args.reconstruction), self.precision():
                features = self.critic.encoder.features(pixels)
        if actor:
            losses |= self.update_actor(features.detach(), noise.actor)
        if targets:
            self.update_targets()
        if args.reconstruction:
            losses |= self.update_reconstruction(features, images[0], noise.dither)
        return losses

    @torch.inference_mode()
    def reconstruct(self, observation: np.ndarray) -> np.ndarray:
        """Reconstructions (N, C, S, S) in [0, 1] of observations (N, C, S, S) uint8."""
        pixels = torch.from_numpy(observation).to(self.device)
        with self.precision():
            return (self.decoder(self.critic.encoder(self.scale(pixels))).float() + 0.5).clamp_(0.0, 1.0).cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to go on as if nothing had happened."""
        optimizers = [f"{name}_optimizer" for name in ("actor", "critic", "alpha", "encoder", "decoder")]
        names = "actor", "critic", "target_critic", "decoder", *optimizers
        return {name: getattr(self, name).state_dict() for name in names} | {"log_alpha": self.log_alpha.detach()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.log_alpha.data.copy_(state["log_alpha"])
        for name in state.keys() - {"log_alpha"}:
            getattr(self, name).load_state_dict(state[name])


# Evaluation ----------------------------------------------------------------------------------------------------------
def evaluate(
    agent: SACAE, env: gym.Env, args: Args, stopped: Callable[[], Any] = lambda: False
) -> tuple[dict[str, float], np.ndarray] | None:
    """Play `eval_episodes` episodes without noise; also give six observations (6, C, S, S) of the first episode.

    Episode i always has `episode_seed(seed, i, stream=1)`; training's random streams are not touched. Gives the mean
    `episodic_return`, `return_std` and the mean `episodic_length` in agent steps; None if it was `stopped`.
    """
    returns, lengths, seen = [], [], []
    for i in range(args.eval_episodes):
        observation, _ = env.reset(seed=episode_seed(args.seed, i, stream=1))
        rewards, done = [], False
        while not done:
            if stopped():
                return None
            if i == 0:
                seen.append(observation)
            observation, reward, terminated, truncated, _ = env.step(agent.act(observation[None])[0])
            rewards.append(reward)
            done = terminated or truncated
        returns.append(sum(rewards))
        lengths.append(len(rewards))
    metrics = {"episodic_return": np.mean(returns), "return_std": np.std(returns), "episodic_length": np.mean(lengths)}
    shown = np.stack([seen[k] for k in np.linspace(0, len(seen) - 1, 6).astype(int)])
    return {name: float(value) for name, value in metrics.items()}, shown


def record_videos(agent: SACAE, args: Args, folder: Path, step: int, stopped: Callable[[], Any]) -> list[Path]:
    """Write mp4 videos of the first three evaluation episodes and return their paths."""
    env = make_env(args, video=True)
    fps = 1.0 / env.unwrapped.control_timestep() if env.through_dm_control else env.metadata.get("render_fps", 30)
    recorder = gym.wrappers.RecordVideo(
        env, str(folder / "videos"), episode_trigger=lambda _: True, name_prefix=f"step{step}",
        fps=max(1, round(fps / args.action_repeat)), disable_logger=True,
    )  # fmt: skip
    evaluate(agent, recorder, replace(args, eval_episodes=3), stopped)
    recorder.close()
    return sorted((folder / "videos").glob(f"step{step}-*.mp4"))


# --- run folder, logging, checkpoints: the same text in every script ---
def usage_error(message: str) -> NoReturn:
    """Print one line about a user's mistake and exit with status 2; called before anything is created."""
    print("error:", *message.split(), file=sys.stderr)  # others' messages may have several lines
    raise SystemExit(2)


def episode_seed(seed: int, index: int, stream: int = 0) -> int:
    """The reset seed of one episode: a pure function, so that each can be replayed alone (stream 1: evaluation)."""
    return int(np.random.SeedSequence([seed, stream, index]).generate_state(1)[0])


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write to a temporary file, flush it to the disk, rename it: a reader sees the old file or the new, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class Run:
    """The run folder, everything that is written into it, and the signals that end a run."""

    def __init__(self, args: Args) -> None:
        """Create `{runs_dir}/{run_name}`, or load its checkpoint with `--resume`. Exits 2 if that is not possible."""
        if args.resume and not args.run_name:
            usage_error("--resume needs the --run-name of the run to continue")
        if args.track:
            try:
                import wandb
            except ModuleNotFoundError:
                usage_error("--track needs wandb; try pip install wandb, or leave it out")
        if args.capture_video and importlib.util.find_spec("moviepy") is None:
            usage_error("--capture-video needs moviepy; try pip install moviepy, or leave it out")
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.name = re.sub(r"[/\\:]", "-", name)
        if self.name in ("", ".", "..") or not self.name.isprintable() or len(os.fsencode(self.name)) > 200:
            usage_error(f"--run-name {name[:50]!r}: a plain folder name of at most 200 bytes expected")
        self.folder = Path(args.runs_dir) / self.name
        self.settings = {k: v for k, v in asdict(args).items() if k not in ("resume", "runs_dir", "run_name")}
        self.eval_rows: list[dict[str, float]] = []
        self.signal, self.at_once, self.wandb, self.checkpoint = 0, False, None, None
        if self.folder.exists() and not args.resume:
            usage_error(f"{self.folder} exists; add --resume to continue it, or choose another --run-name")
        if self.folder.exists():
            found = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"it is a file"}
            if found and not found & {"args.json", "args.json.tmp", "checkpoint.pt", "lock"}:
                usage_error(f"{self.folder} exists but is not a run folder; choose another --run-name")
        try:
            self.folder.mkdir(parents=True, exist_ok=args.resume)
            self.lock = self.take_lock()
        except FileExistsError:  # another process was faster
            usage_error(f"{self.folder} exists; choose another --run-name")
        except OSError as error:
            usage_error(f"cannot create {self.folder}: {error.strerror}; choose another --runs-dir")
        if args.resume:
            self.load_checkpoint()
        if self.checkpoint is None:
            commit = None
            with contextlib.suppress(OSError):  # no git here
                git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
                commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
            about = {
                "script": Path(__file__).stem, "arguments": self.settings, "command": sys.argv,
                "commit": commit, "python": sys.version.split()[0],
                "packages": {d.name: d.version for d in importlib.metadata.distributions()},
            }  # fmt: skip
            write_atomically(self.folder / "args.json", lambda f: f.write(json.dumps(about, indent=1).encode()))
            shutil.copy(__file__, self.folder / Path(__file__).name)
        step = self.checkpoint["step"] if self.checkpoint else 0
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        if args.track:
            try:
                wandb.init(
                    project=args.wandb_project_name, entity=args.wandb_entity, name=self.name, id=self.name,
                    resume="allow", config=self.settings, dir=str(self.folder), save_code=True,
                )  # fmt: skip
            except Exception as error:  # no key, a bad name, no network; nothing is removed: it may be a run of old
                hint = "run `wandb login`" if "key" in str(error) or "login" in str(error) else "change the name"
                hint += f", or set WANDB_MODE=offline, and go on with --run-name {self.name} --resume"
                usage_error(f"wandb: {error}; {hint}")
            wandb.define_metric("*", step_metric="global_step")
            self.wandb = wandb
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", disable=not sys.stderr.isatty())
        self.started = self.shown = self.window_time = time.monotonic()
        self.window_step = step
        self.handlers = {s: signal.signal(s, self.on_signal) for s in (signal.SIGTERM, signal.SIGINT)}

    def take_lock(self) -> BinaryIO:
        """Keep other processes out of the run folder while this one lives. Exits 2 if one is there already."""
        file = open(self.folder / "lock", "ab")  # noqa: SIM115  (open until the run is closed)
        try:  # not flock, which children inherit: one that outlives this process would keep the folder
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            usage_error(f"{self.folder} is in use by another process; end it first, or choose another --run-name")
        except (NameError, OSError) as error:  # not on this system, or not on this file system
            print(f"warning: {self.folder} cannot be locked ({error}); start no second process on it", file=sys.stderr)
        return file

    def on_signal(self, number: int, _: Any) -> None:
        """Remember the signal; the loop saves and stops after its current step. What is made anew stops `at_once`."""
        self.signal = number
        if self.at_once:
            raise KeyboardInterrupt

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Write scalars to TensorBoard and wandb; a loss that is not finite ends the run."""
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if name.startswith("losses/") and not math.isfinite(value):
                self.fail(f"step {step}: {name} is {value}; try a smaller learning rate")
            self.writer.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log({**metrics, "global_step": step})

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Log an evaluation and write `eval.csv` (which has no clock, so that equal runs have equal files)."""
        self.log(step, {f"eval/{name}": value for name, value in metrics.items()})
        self.eval_rows.append({"step": step, **metrics})
        self.write_evaluations()

    def write_evaluations(self) -> None:
        """Write all evaluations so far to `eval.csv`."""
        rows = [row.values() for row in self.eval_rows]
        lines = [",".join(map(str, row)) + "\n" for row in [list(*self.eval_rows[:1]), *rows]]
        write_atomically(self.folder / "eval.csv", lambda file: file.write("".join(lines).encode()))

    def log_figure(self, step: int, name: str, figure: Any) -> None:
        """Write a matplotlib figure to `{name}.png` in the run folder, TensorBoard and wandb (as images/{name})."""
        path = self.folder / f"{name}.png"
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=110))
        figure.clear()
        image = np.asarray(PIL.Image.open(path).convert("RGB"))
        self.writer.add_image(f"images/{name}", image, step, dataformats="HWC")
        if self.wandb:
            self.wandb.log({f"images/{name}": self.wandb.Image(image), "global_step": step})

    def log_videos(self, step: int, paths: list[Path]) -> None:
        """Show videos that lie in the run folder in wandb too."""
        if self.wandb and paths:
            videos = [self.wandb.Video(str(path), format="mp4") for path in paths]
            self.wandb.log({"videos/evaluation": videos, "global_step": step})

    def progress(self, step: int, text: str) -> None:
        """Move the bar; without a terminal, print a line every 10 seconds."""
        self.bar.update(step - self.bar.n)
        now = time.monotonic()
        if now - self.shown > 10.0:
            self.shown = now
            self.bar.set_postfix_str(text, refresh=False)
            if self.bar.disable:
                done = f"step {step:,} of {self.bar.total:,}, {now - self.started:.0f} s"
                print(f"{self.name}: {done}, {text}", flush=True)

    def steps_per_second(self, step: int) -> float:
        """Environment steps per second since the last call."""
        then, self.window_time = self.window_time, time.monotonic()
        steps, self.window_step = step - self.window_step, step
        return steps / max(self.window_time - then, 1e-9)

    def save_checkpoint(self, step: int, state: dict[str, Any], finished: bool = False) -> None:
        """Write `state` (tensors, numbers and strings only) and this block's own to `checkpoint.pt`."""
        own = {
            "script": Path(__file__).stem, "arguments": json.dumps(self.settings), "step": step,
            "eval_rows": self.eval_rows, "finished": finished, "torch_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }  # fmt: skip
        path = self.folder / "checkpoint.pt"
        try:
            write_atomically(path, lambda file: torch.save({**own, **state}, file))
        except (OSError, RuntimeError) as error:  # the disk is full: the checkpoint before is still whole
            self.fail(f"step {step}: cannot write {path} ({error})")

    def load_checkpoint(self) -> None:
        """Read the folder's checkpoint, if there is one. Exits 2 if it is not one of this script and arguments."""
        path, about = self.folder / "checkpoint.pt", self.folder / "args.json"
        try:
            if path.exists():
                if damaged := zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
                    raise ValueError(damaged)
                self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                script, arguments = self.checkpoint["script"], dict(json.loads(self.checkpoint["arguments"]))
                self.eval_rows, finished = self.checkpoint["eval_rows"], self.checkpoint["finished"]
            elif about.exists():
                recorded = json.loads(about.read_text())
                script, arguments = recorded["script"], dict(recorded["arguments"])
            else:
                return  # killed before anything was written
        except Exception as error:  # a damaged file raises nearly anything
            self.refuse_damaged(path if path.exists() else about, error)
        if script != Path(__file__).stem:
            usage_error(f"{self.folder} is a run of {script}.py; choose another --run-name for {Path(__file__).name}")
        changed = [k for k in {**arguments, **self.settings} if arguments.get(k) != self.settings.get(k)]
        if changed:
            listed = ", ".join(f"{k} was {arguments.get(k)}, now {self.settings.get(k)}" for k in changed)
            usage_error(f"--resume with changed arguments: {listed}; repeat the old ones, or choose another --run-name")
        if self.checkpoint and finished:
            print(f"{self.folder} is finished")
            raise SystemExit(0)

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Whatever goes wrong in here, the checkpoint is to blame: exits 2 with one line."""
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            self.close()
            self.refuse_damaged(self.folder / "checkpoint.pt", error)

    def refuse_damaged(self, path: Path, error: Exception) -> NoReturn:
        """Exit 2: a file of the run folder is not what was written."""
        reason = f"{type(error).__name__} {error}".splitlines()[0][:100]
        usage_error(f"{path} is damaged ({reason}); restore a copy, or start again with another --run-name")

    def restore_random_state(self) -> None:
        """Continue the checkpoint's random streams, and its eval.csv: a killed run may have written further."""
        with self.restoring():
            torch.set_rng_state(self.checkpoint["torch_rng"])
            if self.checkpoint["cuda_rng"] is not None and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(self.checkpoint["cuda_rng"])
        self.write_evaluations()

    def fail(self, message: str) -> NoReturn:
        """End the run with one line and status 1; the last checkpoint stays as it is."""
        path = self.folder / "checkpoint.pt"
        last = f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"
        self.close()
        print(f"error: {message}; {last}", file=sys.stderr)
        raise SystemExit(1)

    def stop(self) -> NoReturn:
        """End the run after a signal, with the status that a shell gives it (143 or 130)."""
        self.close()
        print(f"stopped by signal {self.signal}; continue with --run-name {self.name} --resume", file=sys.stderr)
        raise SystemExit(128 + self.signal)

    def close(self) -> None:
        """Close the bar and the loggers and give the signals back."""
        self.bar.close()
        self.writer.close()
        if self.wandb:
            self.wandb.finish()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()


# --- end of the common block ---


# Pictures ------------------------------------------------------------------------------------------------------------
def draw_reconstructions(agent: SACAE, observations: np.ndarray, title: str) -> Figure:
    """The newest frame of each observation (N, C, S, S) above what the autoencoder makes of it."""
    figure = Figure(figsize=(1.5 * len(observations) + 1.0, 3.5), layout="constrained")  # no pyplot, no global state
    axes = figure.subplots(subplot_kw={"title": title})
    rows, size = (observations[:, -3:] / 255.0, agent.reconstruct(observations)[:, -3:]), observations.shape[-1]
    axes.imshow(np.vstack([np.hstack(row.transpose(0, 2, 3, 1)) for row in rows]), interpolation="nearest")
    axes.set(yticks=[size / 2, size * 3 / 2], yticklabels=["observation", "reconstruction"])
    axes.set(xticks=size * np.arange(1, len(observations)) - 0.5, xticklabels=[])
    axes.grid(axis="x", color="black")  # between the pictures
    return figure


def draw_learning_curve(rows: list[dict[str, float]], title: str) -> Figure:
    """Evaluation return, with its deviation over episodes, over environment steps."""
    figure = Figure(figsize=(4.8, 4.0), layout="constrained")
    axes = figure.subplots(subplot_kw={"title": title})
    steps, mean, std = (np.array([row[name] for row in rows]) for name in ("step", "episodic_return", "return_std"))
    axes.plot(steps, mean, marker=".")
    axes.fill_between(steps, mean - std, mean + std, alpha=0.2, linewidth=0)
    axes.set(xlabel="environment steps", ylabel="evaluation return")
    axes.locator_params(axis="x", nbins=5)  # numbers of six digits do not touch
    axes.grid(alpha=0.3)
    return figure


# Main ----------------------------------------------------------------------------------------------------------------
def resolve(args: Args) -> Args:
    """Fill in what depends on the environment and check all sizes. Raises ValueError with one line."""
    args.env_id = re.sub(r"^dm_control/([a-z]\w*-[a-z]\w*)-v0$", r"\1", args.env_id)  # the short form
    for name, value in {**DEFAULTS_BY_ENVIRONMENT[""], **DEFAULTS_BY_ENVIRONMENT.get(args.env_id, {})}.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, value in asdict(args).items():
        least = int(type(value) is int and name not in ("seed", "camera", "learning_starts", "random_shift"))
        most = 2**63 - 1 if type(value) is int else math.inf
        if isinstance(value, int | float) and not (math.isfinite(value) and least <= value <= most):
            limits = f"a number of at least {least}{', below 2**63,' * (value > most)}"
            raise ValueError(f"--{name.replace('_', '-')} {value}: {limits} expected")
    for name, limit in (("gamma", 1.0), ("tau", 1.0), ("encoder_tau", 1.0), ("random_shift", args.image_size)):
        if getattr(args, name) > limit:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at most {limit} expected")
    if args.alpha == 0.0:
        raise ValueError("--alpha 0: a temperature above 0 expected, its logarithm is learnt")
    if feature_map_size(args.image_size, args.num_layers) < 1:
        size = f"--image-size {args.image_size} is too small for --num-layers {args.num_layers}"
        raise ValueError(f"{size}: at least {4 * args.num_layers - 1} pixels expected, or fewer layers")
    steps = agent_steps(args)
    if args.buffer_size is None:
        args.buffer_size = steps
    if args.save_replay and args.buffer_size < steps:
        raise ValueError(f"--save-replay needs all of the run's {steps} transitions; leave out --buffer-size")
    if steps < args.learning_starts:
        flags = f"--total-timesteps {args.total_timesteps} are {steps} agent steps, below --learning-starts"
        raise ValueError(f"{flags} {args.learning_starts}: nothing would be learnt; raise that or lower this")
    return args


def agent_steps(args: Args) -> int:
    """Agent steps of the run, the last one begun within `total_timesteps`."""
    return -(-args.total_timesteps // args.action_repeat)


def replay_sizes(args: Args) -> tuple[int, int]:
    """Transitions that can be sampled, and slots on top: none if all of the run's fit (see `ReplayBuffer`)."""
    steps = agent_steps(args)
    if args.buffer_size >= steps:
        return steps, 0
    return args.buffer_size, -(-args.checkpoint_frequency // args.action_repeat) + args.frame_stack


def announce_replay(args: Args) -> None:
    """Say how large the replay memory will be. Raises ValueError if the disk is too small for a run that is new."""
    frames, size, folder = sum(replay_sizes(args)), args.image_size, Path(args.runs_dir).absolute()
    gigabytes = 3e-9 * size * size * frames
    about = f"replay memory of {frames:,} frames of {size}x{size}: {gigabytes:.2f} GB"
    about += ", and as much for replay.npz" * args.save_replay
    begun = args.run_name and (folder / re.sub("[/:]", "-", args.run_name)).exists()
    folder = next(path for path in (folder, *folder.parents) if path.exists())
    free = 1e-9 * shutil.disk_usage(folder).free
    if not begun and 1.01 * gigabytes * (1 + args.save_replay) > free:  # an episode has one frame more than steps
        hint = "lower --buffer-size or --image-size, leave out --save-replay, or choose another --runs-dir"
        raise ValueError(f"{about}, but {folder} has {free:.2f} GB left; {hint}")
    print(f"{about} on the disk, in the run folder")


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free, up to 32 MiB each (its limit) and 2 GiB in all; other systems do as they do.

    It would give a batch of pictures back to the system and get it again, page by page, several times an update.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        glibc = ctypes.CDLL(None)
        glibc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD
        glibc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def warn_about_bf16() -> None:
    """Say what bfloat16 costs where the processor has no instructions for it."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or re.search(r"\b(amx_bf16|avx512_bf16|bf16)\b", flags.read_text()):
        return

    def seconds(dtype: torch.dtype) -> float:
        values = [torch.ones(shape, dtype=dtype) for shape in ((16, 32, 41, 41), (32, 32, 3, 3))]
        return min(timeit.repeat(lambda: F.conv2d(*values), number=1, repeat=4))

    slower = seconds(torch.bfloat16) / seconds(torch.float32)
    message = f"this processor has neither AMX nor AVX512-bf16: a convolution takes {slower:.1f} times as long"
    print(f"warning: --bf16: {message} as in float32", file=sys.stderr)


def save_model(agent: SACAE, args: Args, path: Path) -> None:
    """Write the weights alone (and the arguments, from which `SACAE` can be built again)."""
    content = {name: getattr(agent, name).state_dict() for name in ("actor", "critic", "decoder")}
    content |= {"action_dim": agent.action_dim, "arguments": json.dumps(asdict(args))}
    write_atomically(path, lambda file: torch.save(content, file))


def main(args: Args) -> Path:
    """Train one agent and return its run folder."""
    try:
        args = resolve(args)
        env, evaluation_env = make_env(args), make_env(args)
        announce_replay(args)
    except ValueError as error:
        usage_error(str(error))
    run = Run(args)
    torch.manual_seed(args.seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, deterministic products fail on a GPU
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written
    torch.set_flush_denormal(True)  # denormal Adam moments slow an optimizer many times over
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")
    if args.bf16 and device.type == "cpu":
        warn_about_bf16()
    repeat, last_step = args.action_repeat, agent_steps(args)
    print(f"{run.name}: {last_step:,} agent steps, each {repeat} environment steps")
    agent = SACAE(args, env.action_dim, device)
    path = run.folder / "frames.bin"
    try:
        if run.checkpoint and not (path.exists() and path.stat().st_size):
            raise ValueError(f"{path} is missing")
        buffer = ReplayBuffer(path, *replay_sizes(args), args.image_size, args.frame_stack, env.action_dim)
    except ValueError as error:
        run.close()
        usage_error(f"{error}; it holds the replay memory: restore it, or start with another --run-name")
    recent: deque[tuple[float, int]] = deque(maxlen=10)  # return and length of the last episodes
    losses: dict[str, Tensor] = {}
    agent_step = episode = updates_due = evaluation_due = 0
    episode_return, episode_actions = 0.0, []

    def start_episode() -> np.ndarray:
        """The first observation of the current episode, whose frame is also put into the buffer."""
        observation, _ = env.reset(seed=episode_seed(args.seed, episode))
        buffer.start_episode(observation[-3:])
        return observation

    def crossed(every: int) -> bool:
        """Whether the last agent step has reached a multiple of so many environment steps."""
        return step // every > max(step - repeat, 0) // every

    if run.checkpoint is None:
        observation = start_episode()
    else:
        state = run.checkpoint
        with run.restoring():
            agent_step, episode = state["agent_step"], state["episode"]
            updates_due, evaluation_due = state["updates_due"], state["evaluation_due"]
            episode_return, episode_actions = state["episode_return"], state["episode_actions"]
            recent.extend(state["recent"])
            if missing := agent.state_dict().keys() - state["agent"].keys():
                raise LookupError(f"without {missing}")
            agent.load_state_dict(state["agent"])
            buffer.load_state_dict(state["buffer"])
            saved_observation = state["observation"].numpy()
        observation, _ = env.reset(seed=episode_seed(args.seed, episode))
        for action in episode_actions:  # replay the interrupted episode up to here
            observation, _, terminated, truncated, _ = env.step(np.array(action, np.float32))
            if terminated or truncated:
                observation = None  # it had not ended
                break
        if not np.array_equal(observation, saved_observation):
            print(f"warning: episode {episode} does not replay to the saved observation; going on with the next one")
            episode, episode_return, episode_actions = episode + 1, 0.0, []
            observation = start_episode()
        run.restore_random_state()

    step = agent_step * repeat
    while True:
        last, burst = agent_step == last_step, agent_step == args.learning_starts
        mean_return, mean_length = np.mean(recent or [(math.nan, math.nan)], 0)
        actor = burst or agent_step % args.policy_frequency == 0
        targets = burst or agent_step % args.target_network_frequency == 0
        # What this agent step still owes is in the checkpoint: a signal interrupts it, and a resumed run goes on here.
        while updates_due and not run.signal:
            updated = agent.update(buffer.sample(args.batch_size, device), actor, targets)
            losses |= {f"losses/{name}": value for name, value in updated.items()}
            updates_due -= 1
            run.progress(step, f"return {mean_return:.3f}" + f", {updates_due:,} updates to go" * (updates_due > 0))
        saving = crossed(args.checkpoint_frequency) or last
        if crossed(1_000) or saving or evaluation_due or run.signal:
            charts = {"charts/episodic_return": mean_return, "charts/episodic_length": mean_length}
            charts["charts/episodes"] = episode
            # Read once a line; a loss that is not finite ends the run here, before it could reach a checkpoint.
            run.log(step, {**losses, **charts, "charts/SPS": run.steps_per_second(step)})
        if evaluation_due and (result := evaluate(agent, evaluation_env, args, lambda: run.signal)):
            metrics, shown = result
            evaluation_due = 0
            run.log_evaluation(step, metrics)
            if args.reconstruction:
                figure = draw_reconstructions(agent, shown, f"{args.env_id}, step {step:,}")
                run.log_figure(step, "reconstruction", figure)
            if metrics["episodic_return"] >= max(row["episodic_return"] for row in run.eval_rows):
                save_model(agent, args, run.folder / "best_model.pt")
        stopping = bool(run.signal)  # one that comes later is seen in the next step, after its checkpoint
        if saving or stopping:
            run.save_checkpoint(step, {
                "agent": agent.state_dict(), "buffer": buffer.state_dict(), "agent_step": agent_step,
                "updates_due": updates_due, "evaluation_due": evaluation_due, "episode": episode,
                "episode_actions": episode_actions, "episode_return": episode_return,
                "observation": torch.from_numpy(observation), "recent": list(recent),
            })  # fmt: skip
        if stopping:
            run.stop()
        if last:
            break

        if agent_step < args.learning_starts:
            action = torch.rand(env.action_dim).mul_(2.0).sub_(1.0).numpy()
        else:
            action = agent.act(observation[None], sample=True)[0]
        if not np.isfinite(action).all():  # diverged: name the loss, if it shows there already
            run.log(step, losses)
            run.fail(f"step {step}: the policy's action is {action}; try a smaller learning rate")
        observation, reward, terminated, truncated, _ = env.step(action)
        agent_step, step = agent_step + 1, step + repeat
        if not math.isfinite(reward):  # must not reach the buffer or a checkpoint
            seed = episode_seed(args.seed, episode)
            run.fail(f"step {step}: reward {reward} is not finite, in the episode with reset seed {seed}")
        try:
            buffer.add(action, reward, terminated, observation[-3:])
            episode_actions.append(action.tolist())
            episode_return += reward
            if terminated or truncated:
                recent.append((episode_return, len(episode_actions)))
                episode, episode_return, episode_actions = episode + 1, 0.0, []
                observation = start_episode()
        except OSError as error:
            run.fail(f"step {step}: cannot write to {buffer.path}: {error.strerror or error}")
        if agent_step >= args.learning_starts:  # first, as the original does, all that the random steps would have had
            updates_due = args.learning_starts if agent_step == args.learning_starts else 1
        evaluation_due = int(crossed(args.eval_frequency) or agent_step == last_step)
        run.progress(step, f"return {mean_return:.3f}")

    save_model(agent, args, run.folder / "model.pt")
    run.log_figure(step, "learning_curve", draw_learning_curve(run.eval_rows, run.name))
    paths = record_videos(agent, args, run.folder, step, lambda: run.signal) if args.capture_video else []
    replay = run.folder / "replay.npz"
    if args.save_replay and not run.signal and not replay.exists():
        try:
            buffer.save_episodes(replay, repeat, env.spec.id)
        except (OSError, MemoryError) as error:
            run.fail(f"step {step}: cannot write {replay}: {error}")
    if run.signal:
        run.stop()
    run.log_videos(step, paths)
    run.save_checkpoint(step, {"agent": agent.state_dict()}, finished=True)
    buffer.close()
    path.unlink()
    run.close()
    score = run.eval_rows[-1]
    print(f"last evaluation: return {score['episodic_return']:.1f} ± {score['return_std']:.1f}; see {run.folder}")
    return run.folder


if __name__ == "__main__":
    main(tyro.cli(Args))
