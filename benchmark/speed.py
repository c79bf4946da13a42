"""Compare a script's speed with a plain version of it, the original's figures, and the machine's limit.

    python benchmark/speed.py hyar_td3
    python benchmark/speed.py sac_ae_pixels --rounds 10 --json speed.json
    make speed    # all scripts, into benchmark/results/speed/ and the tables of the pages

Everything runs in one process with one thread and is measured in CPU-seconds, so that other work on the machine hardly
matters. Things to compare are measured in turn, for several rounds, and the medians are reported. Absolute figures
depend on the machine, ratios hardly do.
"""

import copy
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hyar_td3
import plas_pixels
import pretrain_vae_moa
import sac_ae_pixels
import world_model_test
from envs import stag_hunt

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@dataclass
class Args:
    """What to measure, and how long."""

    script: Annotated[str, tyro.conf.Positional]
    """the script's name, without .py"""
    rounds: int = 5
    """how many times each measurement is made; the median counts"""
    environment_steps: int = 5_000
    """environment steps of one measurement with random actions"""
    update_cycles: int = 40
    """cycles of one measurement of the updates"""
    random_episodes: int = 5_000
    """episodes of the random phase before training"""
    vae_steps: int = 2_000
    """gradient steps of the VAE before training"""
    training_steps: int = 6_000
    """environment steps of training before the learning phase is measured: a new policy's episodes are too short, and
    further steps of the VAE begin after some 3,000"""
    learning_steps: int = 1_000
    """environment steps of one measurement of the learning phase"""
    pixel_environments: tuple[str, ...] = ("cartpole-swingup", "ball_in_cup-catch", "walker-walk")
    """sac_ae_pixels: the environments whose steps are measured"""
    pixel_steps: int = 50
    """sac_ae_pixels: agent steps of one measurement with random actions"""
    pixel_batch_size: int = 128
    """sac_ae_pixels: batch size of the updates"""
    image_size: int = 84
    """sac_ae_pixels: image size of the updates"""
    pixel_updates: int = 40
    """plas_pixels: updates of one measurement"""
    world_updates: int = 10
    """world_model_test: updates of one measurement"""
    keep_freed_memory: bool = True
    """if toggled, glibc keeps freed memory: the pixel scripts do this, and real runs of the others end up with it"""
    memory: bool = True
    """if toggled off, --json leaves out the peak memory of a short run"""
    json: Path | None = None
    """a file to write the figures to"""


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call, in seconds."""
    start = time.process_time()
    work()
    return time.process_time() - start


def medians(rounds: int, works: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median CPU-seconds of each work, all of them in turn, after one warm-up round."""
    times = [{name: cpu_seconds(work) for name, work in works.items()} for _ in range(rounds + 1)]
    return {name: float(np.median([row[name] for row in times[1:]])) for name in works}


def repeat(work: Callable[[], Any], times: int) -> Callable[[], None]:
    """A function that does `work` so many `times` in a row."""

    def run() -> None:
        for _ in range(times):
            work()

    return run


class Roofline:
    """What the machine can do at most: the best rate of a large matrix product and of two convolutions.

    No single work will do: on some CPUs the library of the convolutions is faster than that of the products.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Works in `dtype`, on one thread, to be measured beside those that are compared with them."""
        self.works: dict[str, Callable[[], None]] = {}
        self.operations: dict[str, float] = {}
        left, right = (torch.randn(1024, 1024).to(dtype) for _ in range(2))
        self._add(f"{dtype} product", 2.0 * 1024**3, lambda: left @ right)
        for channels in (32, 64):
            pictures = torch.randn(32, channels, 32, 32).to(dtype, memory_format=torch.channels_last)
            filters = torch.randn(channels, channels, 3, 3).to(dtype, memory_format=torch.channels_last)
            convolution = functools.partial(torch.conv2d, pictures, filters)
            self._add(f"{dtype} convolution, {channels}", 2.0 * 32 * 30 * 30 * 9 * channels**2, convolution)

    def _add(self, name: str, operations: float, work: Callable[[], Any]) -> None:
        self.works[name], self.operations[name] = repeat(work, 10), 10 * operations

    def rate(self, seconds: dict[str, float]) -> float:
        """Operations per CPU-second, from the `medians` of the works."""
        return max(operations / seconds[name] for name, operations in self.operations.items())


# HyAR-TD3 ------------------------------------------------------------------------------------------------------------
# The original's environment steps per CPU-second, and those of its whole learning phase on Platform, both measured on
# another machine of this class.
ORIGINAL_ENVIRONMENTS = {"Platform-v0": 306, "Goal-v0": 927, "HardMove10-v0": 444}
ORIGINAL_LEARNING = (42, 50)


class PlainHyARTD3:
    """`HyARTD3.update` in plain eager PyTorch: it gives the same weights, and is what the fast one is measured against.

    Two critics, a separate pass for each update, relabelling that decodes both heads and encodes all rows, targets
    that follow parameter by parameter. It has no loop over rows either, no `.item()`, and fused Adam.
    """

    def __init__(self, agent: hyar_td3.HyARTD3) -> None:
        """Start from copies of the agent's networks, with new optimizers."""
        self.args, self.embedding_dim = agent.args, agent.embedding_dim
        self.vae, self.actor, self.target_actor, self.average_actor = (
            copy.deepcopy(network) for network in (agent.vae, agent.actor, agent.target_actor, agent.average_actor)
        )
        self.critics = separate_critics(agent.critic)
        self.target_critics = separate_critics(agent.target_critic)
        self.actor_updates, rate = agent.actor_updates, self.args.learning_rate
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=rate, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=rate, fused=True)

    def update(self, batch: hyar_td3.Batch, noise: Tensor) -> None:
        """The critic updates on the parts of `batch` (B rows), then one of the actor; `noise` (B, 2 (d1 + d2))."""
        parts = self.args.policy_frequency
        for *columns, part_noise in zip(*(column.chunk(parts) for column in (*batch, noise)), strict=True):
            part = hyar_td3.Batch(*columns)
            self.update_critics(part, part_noise)
        self.update_actor(part.observation)

    def clipped(self, noise: Tensor) -> Tensor:
        """The smoothing noise."""
        return (self.args.policy_noise * noise).clamp(-self.args.noise_clip, self.args.noise_clip)

    def update_critics(self, batch: hyar_td3.Batch, noise: Tensor) -> None:
        """Relabel, one step of clipped double Q-learning."""
        relabel_noise, smoothing = noise.chunk(2, 1)
        with torch.no_grad():
            latent_action = self.relabel(batch, relabel_noise)
            next_action = (self.target_actor(batch.next_observation) + self.clipped(smoothing)).clamp(-1.0, 1.0)
            inputs = torch.cat((batch.next_observation, next_action), 1)
            next_value = torch.minimum(*(critic(inputs)[:, 0] for critic in self.target_critics))
            target = batch.reward + self.args.gamma * (1.0 - batch.terminated) * next_value
        inputs = torch.cat((batch.observation, latent_action), 1)
        first, second = (critic(inputs)[:, 0] for critic in self.critics)
        loss = F.mse_loss(first, target) + F.mse_loss(second, target)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

    def relabel(self, batch: hyar_td3.Batch, noise: Tensor) -> Tensor:
        """Latent actions that the VAE decodes into what was done."""
        vae, table = self.vae, self.vae.discrete_embedding()
        sizes = self.embedding_dim, batch.latent_action.shape[1] - self.embedding_dim
        (embedding, z), (embedding_noise, latent_noise) = batch.latent_action.split(sizes, 1), noise.split(sizes, 1)
        own = table[batch.k]
        nearest = (embedding[:, None] - table).square().sum(2).argmin(1)
        new_embedding = (own + self.clipped(embedding_noise)).clamp(-1.0, 1.0)
        embedding = torch.where((nearest == batch.k)[:, None], embedding, new_embedding)

        hidden = vae.decode(batch.observation, own, vae.to_latent(z))
        _, delta = torch.tanh(vae.parameter_head(hidden)), torch.tanh(vae.state_head(hidden))
        error = (delta - (batch.next_observation - batch.observation)).square().mean(1)
        mean, std = vae.encode(batch.observation, own, batch.x)
        valid = error < self.args.relabel_threshold * vae.state_error
        z = torch.where(valid[:, None], z, vae.to_policy(mean + std * latent_noise))
        return torch.cat((embedding, z), 1)

    def update_actor(self, observation: Tensor) -> None:
        """One step up the first critic with inverted gradients; targets and average follow."""
        action = self.actor(observation)
        leaf = action.detach().requires_grad_()
        value = self.critics[0](torch.cat((observation, leaf), 1)).mean()
        (gradient,) = torch.autograd.grad(value, leaf)
        room = torch.where(gradient > 0.0, 1.0 - action.detach(), 1.0 + action.detach()) / 2.0
        self.actor_optimizer.zero_grad()
        action.backward(-gradient * room)
        nn.utils.clip_grad_norm_(self.actor.parameters(), 10.0)
        self.actor_optimizer.step()
        self.actor_updates += 1
        follow = (
            (self.target_actor, self.actor, self.args.tau),
            (self.target_critics, self.critics, self.args.tau),
            (self.average_actor, self.actor, max(self.args.policy_average, 1.0 / self.actor_updates)),
        )
        with torch.no_grad():
            for follower, network, rate in follow:
                for old, new in zip(follower.parameters(), network.parameters(), strict=True):
                    old.lerp_(new, rate)


def separate_critics(twin: hyar_td3.TwinCritic) -> nn.ModuleList:
    """The twins as two networks of their own, with copied weights."""
    critics = nn.ModuleList()
    for weights in twin_weights(twin):
        layers: list[nn.Module] = []
        for weight, bias in weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0])
            layer.load_state_dict({"weight": weight, "bias": bias})
            layers += [layer, nn.ReLU(True)]
        critics.append(nn.Sequential(*layers[:-1]))
    return critics


def twin_weights(twin: hyar_td3.TwinCritic) -> list[list[tuple[Tensor, Tensor]]]:
    """Weight (outputs, inputs) and bias (outputs,) of each layer of each twin."""
    return [
        [(twin.weight1[i].T, twin.bias1[i, 0]), (twin.weight2[i].T, twin.bias2[i, 0]), (twin.weight3[i], twin.bias3[i])]
        for i in range(2)
    ]


def operations_per_update(agent: hyar_td3.HyARTD3, encoded_share: float) -> float:
    """Floating-point operations of the matrix products of one update cycle, from the layer sizes.

    A product of a row with a weight matrix costs 2 x inputs x outputs. A gradient by the weights costs as much again,
    and so does one by the inputs, which a network's first layer does not need (the actor needs it, for the critic's
    latent action alone). Everything else, such as biases, activations, Adam and the targets, counts as nothing: this is
    the work that cannot be avoided. `encoded_share` of the rows is relabelled, which costs an encoder.
    """
    hidden, observation, latent = 256, agent.actor[0].in_features, agent.latent_dim
    condition, action = observation + agent.embedding_dim, agent.latent_action_dim
    square = hidden * hidden
    encoder = (condition + agent.mask.shape[1] + 2 * latent) * hidden + 2 * square
    decoder = (condition + latent + observation) * hidden + 3 * square  # the head of the state change included
    actor = (observation + action) * hidden + square
    critic_first, critic_rest = (observation + action) * hidden, square + hidden
    critic = critic_first + critic_rest
    target = encoded_share * encoder + decoder + actor + 2 * critic
    critic_update = 2 * (2 * critic + critic_rest)
    actor_update = 2 * actor + square + action * hidden + critic + critic_rest + action * hidden
    rows = agent.args.batch_size
    return 2.0 * rows * (agent.args.policy_frequency * (target + critic_update) + actor_update)


def environment_speed(env_id: str, args: Args) -> dict[str, float]:
    """Environment steps and sub-steps per CPU-second of random actions, drawn beforehand, without wrappers."""
    env = gym.make(env_id).unwrapped
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(args.environment_steps)]
    substeps = 0

    def play() -> None:
        nonlocal substeps
        substeps = 0
        env.reset(seed=0)
        for action in actions:
            _, _, terminated, truncated, info = env.step(action)
            substeps += info["substeps"]
            if terminated or truncated:
                env.reset()

    seconds = medians(args.rounds, {"play": play})["play"]
    return {"steps_per_second": len(actions) / seconds, "substeps_per_second": substeps / seconds}


class LearningPhase:
    """`main`'s loop on Platform without evaluation, logging and checkpoints: act, step, store, update, refresh."""

    def __init__(self, args: Args) -> None:
        """The random phase, and a short pre-training of the VAE."""
        own = hyar_td3.Args(env_id="Platform-v0", random_episodes=args.random_episodes)
        own.total_timesteps = args.training_steps + (args.rounds + 1) * args.learning_steps
        own.learning_starts = min(own.learning_starts, own.total_timesteps)
        hyar_td3.check(own)
        self.args = own
        self.env = hyar_td3.make_env(own)
        self.agent = hyar_td3.HyARTD3(own, self.env, CPU)
        sizes = self.env.observation_dim, self.agent.latent_action_dim, self.env.parameter_dim
        self.buffer = hyar_td3.ReplayBuffer(*sizes)
        no_run: Any = SimpleNamespace(progress=lambda *_: None, signal=0)  # random_phase looks at these alone
        hyar_td3.random_phase(self.env, self.buffer, own, no_run)
        for _ in range(args.vae_steps):
            self.agent.update_vae(self.sample(own.vae_batch_size))
        self.agent.update_latent_range(self.sample(hyar_td3.LATENT_RANGE_ROWS))
        self.episode = self.length = self.step = self.updates_due = 0
        self.observation = self.reset()
        self.kept: list[Tensor] = []  # share of rows whose latent action needed no relabelling

    def sample(self, rows: int) -> hyar_td3.Batch:
        """Rows from all transitions, for the VAE."""
        return self.buffer.sample(0, rows, CPU)

    def reset(self) -> np.ndarray:
        """The first observation of the next episode."""
        seed = hyar_td3.episode_seed(self.args.seed, self.args.random_episodes + self.episode)
        return self.env.reset(seed=seed)[0]

    def run(self, steps: int) -> None:
        """Continue for this many environment steps."""
        agent, args, buffer = self.agent, self.args, self.buffer
        start = hyar_td3.EXPLORATION_NOISE_START
        for _ in range(steps):
            self.step += 1
            decay = min(1.0, self.episode / args.exploration_noise_episodes)
            noise = start + decay * (args.exploration_noise - start)
            latent_action, k, x = (value[0] for value in agent.act(self.observation[None], noise))
            next_observation, reward, terminated, truncated, _ = self.env.step((int(k), x))
            buffer.add(self.observation, latent_action, x, k, next_observation, reward, terminated)
            self.observation = next_observation
            self.length += 1
            if self.step >= args.learning_starts:
                self.updates_due += 2 if self.length == 1 else 1
                while self.updates_due >= args.policy_frequency:
                    oldest = max(buffer.random_size, buffer.size - args.buffer_size)
                    rows = args.policy_frequency * args.batch_size
                    self.kept.append(agent.update(buffer.sample(oldest, rows, CPU))["kept_latent"])
                    self.updates_due -= args.policy_frequency
            if terminated or truncated:
                self.episode, self.length = self.episode + 1, 0
                if self.episode >= hyar_td3.VAE_UPDATE_START and self.episode % args.vae_update_episodes == 0:
                    agent.update_vae(self.sample(args.vae_batch_size))
                    agent.update_latent_range(self.sample(hyar_td3.LATENT_RANGE_ROWS))
                self.observation = self.reset()


def measure_hyar_td3(args: Args) -> dict[str, Any]:
    """Environments, learning phase, updates and plain ones compared, the share of the machine's matrix-product rate."""
    print("environments, random actions")
    environments = {}
    for env_id, original in ORIGINAL_ENVIRONMENTS.items():
        figures = environment_speed(env_id, args)
        figures |= {"original": original, "ratio": figures["steps_per_second"] / original}
        environments[env_id] = figures
        print(
            f"  {env_id:14} {figures['steps_per_second']:8,.0f} steps/s, original {original}: "
            f"{figures['ratio']:.1f} times; {figures['substeps_per_second']:,.0f} sub-steps/s"
        )

    phase = LearningPhase(args)
    phase.run(args.training_steps)
    episodes = phase.episode
    seconds = medians(args.rounds, {"learning": lambda: phase.run(args.learning_steps)})["learning"]
    length = (args.rounds + 1) * args.learning_steps / max(phase.episode - episodes, 1)
    rate, (low, high) = args.learning_steps / seconds, ORIGINAL_LEARNING
    learning = {"steps_per_second": rate, "episode_length": length, "original": ORIGINAL_LEARNING}
    learning |= {"ratio": (rate / high, rate / low)}
    print(f"learning phase on Platform, episodes of {length:.1f} steps on average")
    print(f"  {rate:,.0f} environment steps/s, original {low}-{high}: {rate / high:.1f}-{rate / low:.1f} times")

    agent, plain = phase.agent, PlainHyARTD3(phase.agent)
    rows, frequency = agent.args.policy_frequency * agent.args.batch_size, agent.args.policy_frequency
    batch = phase.buffer.sample(phase.buffer.random_size, rows, CPU)
    noise = torch.randn(rows, 2 * agent.latent_action_dim)
    left, right, out = torch.randn(128, 256), torch.randn(256, 256), torch.empty(128, 256)
    cycles, products = args.update_cycles, 10 * args.update_cycles
    seconds_of = medians(args.rounds, {
        "fast": repeat(lambda: agent.update(batch, noise), cycles),
        "plain": repeat(lambda: plain.update(batch, noise), cycles),
        "product": repeat(lambda: torch.mm(left, right, out=out), products),
    })  # fmt: skip
    product_rate = 2.0 * 128 * 256 * 256 * products / seconds_of["product"]
    encoded = 1.0 - float(torch.stack(phase.kept[-100:]).mean())
    operations = operations_per_update(agent, encoded)
    updates: dict[str, Any] = {
        name: {
            "updates_per_second": frequency * cycles / seconds_of[name],
            "milliseconds_per_cycle": 1e3 * seconds_of[name] / cycles,
            "roofline_share": operations * cycles / seconds_of[name] / product_rate,
        }
        for name in ("fast", "plain")
    }
    updates["ratio"] = seconds_of["plain"] / seconds_of["fast"]
    print(f"updates; a cycle is {frequency} of the critics and 1 of the actor, batch {agent.args.batch_size}")
    for name in ("fast", "plain"):
        figures = updates[name]
        print(
            f"  {name:5} {figures['updates_per_second']:6.1f} updates/s, "
            f"{figures['milliseconds_per_cycle']:.2f} ms a cycle, {figures['roofline_share']:.0%} of the roofline"
        )
    print(f"  fast is {updates['ratio']:.2f} times plain")
    print(
        f"  roofline: {operations / 1e6:.0f} million operations a cycle ({encoded:.1%} of the rows relabelled); "
        f"matrix products of 128x256x256 run at {product_rate / 1e9:.0f} GFLOP/s"
    )
    roofline = {"operations_per_cycle": operations, "product_operations_per_second": product_rate}

    vae_batch = phase.sample(agent.args.vae_batch_size)

    def vae_steps(rebuild: bool) -> Callable[[], None]:
        """The VAE's steps with one Adam, or with a new one each, as the original code has them."""

        def step() -> None:
            agent.args.rebuild_vae_optimizer = rebuild
            agent.update_vae(vae_batch)

        return repeat(step, cycles)

    seconds_of = medians(args.rounds, {"one Adam": vae_steps(False), "rebuilt Adam": vae_steps(True)})
    vae = {name: cycles / value for name, value in seconds_of.items()}
    print("steps of the VAE: " + ", ".join(f"{value:.0f}/s with {name}" for name, value in vae.items()))
    return {"environments": environments, "learning": learning, "updates": updates, "roofline": roofline, "vae": vae}


# SAC+AE --------------------------------------------------------------------------------------------------------------
class PlainSACAE:
    """`SACAE.update` in plain eager PyTorch: it gives the same weights, and is what the fast one is measured against.

    A pass of the encoder for each of critic, actor and autoencoder, plain contiguous memory, gradients for everything
    that a loss reaches, targets that follow parameter by parameter. It has no loop over rows and no `.item()` either,
    and fused Adam.
    """

    def __init__(self, agent: sac_ae_pixels.SACAE) -> None:
        """Start from copies of the agent's networks, with new optimizers."""
        self.args, self.action_dim = agent.args, agent.action_dim
        self.actor, self.critic, self.target_critic, self.decoder = (
            copy.deepcopy(network).to(memory_format=torch.contiguous_format)
            for network in (agent.actor, agent.critic, agent.target_critic, agent.decoder)
        )
        self.actor.encoder.convs = self.critic.encoder.convs
        for network in (self.actor, self.critic, self.target_critic, self.decoder):
            for name in ("encoder", ""):
                module = getattr(network, name, None) if name else network
                if hasattr(module, "fc"):
                    self.flatten_filters_first(module, decoder=module is self.decoder)
        self.log_alpha = nn.Parameter(agent.log_alpha.detach().clone())

        def adam(parameters: Any, learning_rate: float, **options: Any) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, lr=learning_rate, fused=True, **options)

        rate, encoder = self.args.learning_rate, self.critic.encoder
        self.actor_optimizer = adam(self.actor.own_parameters(), rate)
        self.critic_optimizer = adam(self.critic.parameters(), rate)
        self.alpha_optimizer = adam([self.log_alpha], self.args.alpha_learning_rate, betas=(0.5, 0.999))
        self.encoder_optimizer = adam(encoder.parameters(), rate)
        self.decoder_optimizer = adam(self.decoder.parameters(), rate, weight_decay=self.args.decoder_weight_decay)

    def flatten_filters_first(self, module: nn.Module, decoder: bool) -> None:
        """Reorder a linear layer for features (filter, row, column), which contiguous images have without a copy."""
        filters, height, width = self.decoder.shape
        order = torch.arange(filters * height * width).view(height, width, filters).permute(2, 0, 1).flatten()
        with torch.no_grad():
            weight = module.fc.weight
            module.fc.weight = nn.Parameter(weight[order] if decoder else weight[:, order], weight.requires_grad)
            if decoder:
                module.fc.bias = nn.Parameter(module.fc.bias[order])

    def latent(self, encoder: nn.Module, pixels: Tensor, detach: bool = False) -> Tensor:
        """A whole pass of an encoder."""
        hidden = pixels
        for conv in encoder.convs:
            hidden = F.relu(conv(hidden))
        hidden = hidden.flatten(1)
        return torch.tanh(encoder.ln(encoder.fc(hidden.detach() if detach else hidden)))

    def policy(self, pixels: Tensor, noise: Tensor, detach: bool) -> tuple[Tensor, Tensor]:
        """Sampled action and its log-probability."""
        output = self.actor.trunk(self.latent(self.actor.encoder, pixels, detach))
        return sac_ae_pixels.squashed_gaussian(output, noise)[:2]

    def values(self, critic: nn.Module, pixels: Tensor, action: Tensor, detach: bool = False) -> tuple[Tensor, Tensor]:
        """Both Q functions."""
        inputs = torch.cat((self.latent(critic.encoder, pixels, detach), action), 1)
        return critic.q1(inputs)[:, 0], critic.q2(inputs)[:, 0]

    def update(self, batch: sac_ae_pixels.Batch, delayed: bool, noise: sac_ae_pixels.Noise | None = None) -> None:
        """One update; actor, temperature and targets only where `delayed`. Draws its noise if none is given."""
        args, pixels = self.args, batch.observation.contiguous().float() / 255.0
        following = batch.next_observation.contiguous().float() / 255.0
        target_noise, actor_noise = (torch.randn_like(batch.action) for _ in range(2))
        dither = torch.rand_like(pixels) if noise is None else noise.dither.contiguous() / 256.0
        if noise is not None:
            target_noise, actor_noise = noise.target, noise.actor

        with torch.no_grad():
            action, log_probability = self.policy(following, target_noise, detach=False)
            value = torch.minimum(*self.values(self.target_critic, following, action))
            value = value - self.log_alpha.exp() * log_probability
            target = batch.reward + args.gamma * (1.0 - batch.terminated) * value
        q1, q2 = self.values(self.critic, pixels, batch.action)
        self.step(F.mse_loss(q1, target) + F.mse_loss(q2, target), self.critic_optimizer)

        if delayed:
            action, log_probability = self.policy(pixels, actor_noise, detach=True)
            value = torch.minimum(*self.values(self.critic, pixels, action, detach=True))
            alpha = self.log_alpha.exp()
            self.step((alpha.detach() * log_probability - value).mean(), self.actor_optimizer)
            self.step((alpha * (self.action_dim - log_probability).detach()).mean(), self.alpha_optimizer)
            with torch.no_grad():
                for name, rate in (("encoder", args.encoder_tau), ("q1", args.tau), ("q2", args.tau)):
                    pair = (getattr(critic, name).parameters() for critic in (self.target_critic, self.critic))
                    for old, new in zip(*pair, strict=True):
                        old.lerp_(new, rate)

        image = torch.floor(batch.observation.contiguous().float() / 8.0) / 32.0 + dither / 32.0 - 0.5
        latent, decoder = self.latent(self.critic.encoder, pixels), self.decoder
        hidden = F.relu(decoder.fc(latent)).view(-1, *decoder.shape)
        for deconv in decoder.deconvs[:-1]:
            hidden = F.relu(nn.ConvTranspose2d.forward(deconv, hidden))
        loss = F.mse_loss(nn.ConvTranspose2d.forward(decoder.deconvs[-1], hidden), image)
        loss = loss + args.latent_weight * 0.5 * latent.square().sum(1).mean()
        self.step(loss, self.encoder_optimizer, self.decoder_optimizer)

    def step(self, loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        """One step of these optimizers."""
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()


def operations_per_pixel_update(agent: sac_ae_pixels.SACAE) -> float:
    """Floating-point operations of the products and convolutions of an average update; every second one has an actor's.

    Counted as for HyAR-TD3: a gradient by the weights and one by the inputs cost as much as the pass itself, each where
    it is needed. The pass of the convolutions that actor and autoencoder share counts once.
    """
    args, filters, channels = agent.args, agent.args.num_filters, 3 * agent.args.frame_stack
    sizes = [agent.decoder.shape[1] + 2 * i for i in reversed(range(args.num_layers))]
    first, *rest = (
        9 * size * size * filters * (filters if i else channels) for i, size in enumerate(sizes)
    )  # of one image; the decoder's layers are the same, the other way round
    convolutions, head = first + sum(rest), filters * agent.decoder.shape[1] ** 2 * args.feature_dim
    hidden = args.hidden_dim
    trunk = hidden * (args.feature_dim + hidden + 2 * agent.action_dim)
    q = hidden * (args.feature_dim + agent.action_dim + hidden + 1)
    critic = 5 * convolutions - first + 5 * head + trunk + 8 * q
    actor = 3 * head + 3 * trunk + 4 * q
    autoencoder = 6 * convolutions - first + 6 * head
    return 2.0 * args.batch_size * (critic + autoencoder + actor / 2)


def slow_environment(args: sac_ae_pixels.Args) -> sac_ae_pixels.PixelEnv:
    """The environment with the task's own shadow map, rendered without keeping a camera."""
    camera, sac_ae_pixels.fast_camera = sac_ae_pixels.fast_camera, lambda *_: None
    try:
        return sac_ae_pixels.make_env(args)
    finally:
        sac_ae_pixels.fast_camera = camera


def pixel_environment_speed(env_id: str, args: Args) -> dict[str, float]:
    """CPU-seconds of an agent step (simulation, picture, scaling), as it is and as the task draws itself."""
    works = {}
    own = sac_ae_pixels.Args(env_id=env_id)
    sac_ae_pixels.check(own)
    for quality in ("fast", "original"):
        env = sac_ae_pixels.make_env(own) if quality == "fast" else slow_environment(own)
        generator = np.random.default_rng(0)
        actions = generator.uniform(-1.0, 1.0, (args.pixel_steps, env.action_dim)).astype(np.float32)

        def steps(env: gym.Env = env, actions: np.ndarray = actions) -> None:
            env.reset(seed=0)
            for action in actions:
                env.step(action)

        works[quality] = steps
    seconds = medians(args.rounds, works)
    return {"action_repeat": own.action_repeat} | {name: value / args.pixel_steps for name, value in seconds.items()}


def measure_sac_ae_pixels(args: Args) -> dict[str, Any]:
    """Environment steps, updates compared with plain ones, and the share of the roofline."""
    print("environments, random actions, one picture of 84x84 a step")
    environments = {}
    for env_id in args.pixel_environments:
        figures = environments[env_id] = pixel_environment_speed(env_id, args)
        ratio = figures["original"] / figures["fast"]
        print(
            f"  {env_id:18} {1e3 * figures['fast']:5.1f} ms an agent step; with the task's own shadow map and buffer "
            f"{1e3 * figures['original']:.1f} ms: {ratio:.1f} times"
        )

    options = {"env_id": "cheetah-run", "batch_size": args.pixel_batch_size, "image_size": args.image_size}
    size, agents = (args.image_size, args.image_size), []
    for half in (False, True):
        own = sac_ae_pixels.Args(**options, bf16=half)
        sac_ae_pixels.check(own)
        agents.append(sac_ae_pixels.SACAE(own, size, 6, torch.device("cpu")))
    fast, bf16 = agents
    plain = PlainSACAE(fast)
    with tempfile.TemporaryDirectory() as folder:
        buffer = sac_ae_pixels.ReplayBuffer(Path(folder) / "frames.bin", 500, 500, size, 3, 6)
        generator = np.random.default_rng(0)
        frames = generator.integers(0, 256, (501, 3, *size), np.uint8)
        buffer.start_episode(frames[0])
        for frame in frames[1:]:
            buffer.add(generator.uniform(-1.0, 1.0, 6).astype(np.float32), 1.0, False, frame)

        def pair(update: Callable[[sac_ae_pixels.Batch, bool], Any]) -> Callable[[], None]:
            """An update without and one with actor and targets, each on a batch of its own."""

            def run() -> None:
                for delayed in (False, True):
                    update(buffer.sample(args.pixel_batch_size, torch.device("cpu")), delayed)

            return run

        works = {
            "plain": pair(plain.update),
            "fast": pair(lambda batch, delayed: fast.update(batch, delayed, delayed)),
            "bf16": pair(lambda batch, delayed: bf16.update(batch, delayed, delayed)),
            "sample": repeat(lambda: buffer.sample(args.pixel_batch_size, torch.device("cpu")), 10),
        }
        rooflines = {"fast": Roofline(torch.float32), "bf16": Roofline(torch.bfloat16)}
        seconds = medians(args.rounds, works | rooflines["fast"].works | rooflines["bf16"].works)
        buffer.close(keep=False)
    operations = operations_per_pixel_update(fast)
    rates = {name: roofline.rate(seconds) for name, roofline in rooflines.items()}
    updates: dict[str, Any] = {}
    print(f"updates, batch {args.pixel_batch_size}, every second with actor and targets, sampling included")
    for name in ("plain", "fast", "bf16"):
        took = seconds[name] / 2
        rate = rates["bf16" if name == "bf16" else "fast"]
        updates[name] = {
            "seconds": took, "ratio": seconds["plain"] / seconds[name], "roofline_share": operations / took / rate,
        }  # fmt: skip
        print(
            f"  {name:5} {1e3 * took:7.1f} ms, {1 / took:.2f} updates/s, {updates[name]['ratio']:.2f} times plain, "
            f"{updates[name]['roofline_share']:.0%} of the roofline"
        )
    print(
        f"  roofline: {operations / 1e9:.1f} GFLOP an update; the machine's best rate is "
        f"{rates['fast'] / 1e9:.0f} GFLOP/s in float32, {rates['bf16'] / 1e9:.0f} in bfloat16"
    )
    print(f"  sampling {1e2 * seconds['sample']:.1f} ms of it")
    pictures = f"{args.image_size} x {args.image_size}, batch {args.pixel_batch_size}"
    own = {"environments": environments, "pictures": pictures, "updates": updates}
    return own | {"operations": operations, "best_rates": rates}


# PLAS from pixels ----------------------------------------------------------------------------------------------------
class PlainPLAS:
    """`plas_pixels.PLAS` without its fast path: float pictures, a pass of the encoder for each loss."""

    def __init__(self, agent: plas_pixels.PLAS, env: gym.Env, dataset: plas_pixels.Dataset) -> None:
        """Start from the weights of `agent`; `dataset` is held as floats."""
        self.agent = plas_pixels.PLAS(agent.args, env, agent.device)
        self.agent.load_state_dict(agent.state_dict())
        self.agent.to(memory_format=torch.contiguous_format)
        self.images, self.dataset = dataset.images.float(), dataset

    def batch(self, index: Tensor) -> plas_pixels.Batch:
        """Transitions by index, two gathers of float pictures."""
        frames, data = self.dataset.frames[index], self.dataset
        observation, following = (self.images[part].flatten(1, 2) for part in (frames[:, :-1], frames[:, 1:]))
        return plas_pixels.Batch(observation, data.action[index], data.reward[index], following, data.discount[index])

    def update(self, batch: plas_pixels.Batch, noise: dict[str, Tensor]) -> None:
        """The same step as `PLAS.update`, one loss after the other."""
        agent, signals = self.agent, self.agent.signals
        optimizers = [optimizer for name, optimizer in agent.optimizers.items() if name != "policy"]
        for optimizer in optimizers:
            optimizer.zero_grad()
        target = agent.critic_target(batch, noise)
        feature = agent.encoder(batch.observation)
        agent.critic_loss(feature if "critic" in signals else feature.detach(), batch, target).backward()
        feature = agent.vae_encoder(batch.observation)
        feature = feature if "vae" in signals else feature.detach()
        agent.vae_loss(feature, batch, noise["vae"])[0].backward()
        if agent.picture_decoder is not None:
            decoded = agent.picture_decoder(agent.encoder(batch.observation))
            F.mse_loss(decoded, batch.observation / 255.0 - 0.5).backward()
        with torch.no_grad():  # before the encoder moves, as in the fast form
            feature, vae_feature = agent.views(batch.observation)
        for optimizer in optimizers:
            optimizer.step()
        if agent.args.policy == "latent":
            agent.update_policy(feature, vae_feature)
        with torch.no_grad():
            for target_parameter, online in zip(agent.targets, agent.online, strict=True):
                target_parameter.lerp_(online, agent.args.tau)


def measure_plas_pixels(args: Args) -> dict[str, Any]:
    """Updates compared with plain ones, and the share of the roofline, for two picture sizes."""
    figures: dict[str, Any] = {}
    rooflines = {"fast": Roofline(torch.float32), "bf16": Roofline(torch.bfloat16)}
    for name, env_id, size in (("28 x 28", "DotHazard-v0", 28), ("64 x 64", "Pendulum-v1", 64)):
        own = plas_pixels.Args(env_id=env_id, image_size=size)
        plas_pixels.check(own)
        env, start = plas_pixels.make_env(own), time.process_time()
        transitions = plas_pixels.collect(env, 600, seed=0)
        steps_per_second = 600 * own.action_repeat / (time.process_time() - start)
        dataset = plas_pixels.Dataset(transitions, own.frame_stack)
        fast, bf16 = (plas_pixels.PLAS(replace(own, bf16=half), env, CPU) for half in (False, True))
        plain, batch_size = PlainPLAS(fast, env, dataset), own.batch_size

        def plain_update(plain: PlainPLAS = plain, dataset: Any = dataset, batch_size: int = batch_size) -> None:
            index = torch.randint(len(dataset.rows), (batch_size,))
            plain.update(plain.batch(index), plain.agent.draw_noise(batch_size))

        def update(agent: plas_pixels.PLAS, dataset: Any = dataset, batch_size: int = batch_size) -> None:
            agent.update(dataset.sample(batch_size, 0))

        count = max(1, args.pixel_updates if size == 28 else args.pixel_updates // 10)
        works = {
            "plain": repeat(plain_update, count),
            "fast": repeat(lambda fast=fast, update=update: update(fast), count),
            "bf16": repeat(lambda bf16=bf16, update=update: update(bf16), count),
        }
        seconds = medians(args.rounds, works | rooflines["fast"].works | rooflines["bf16"].works)
        with FlopCounterMode(display=False) as counter:
            update(fast)
        operations = counter.get_total_flops()
        print(f"updates, pictures of {name}, batch {batch_size}, {operations / 1e9:.2f} GFLOP each, sampling included")
        figures[name] = {"operations": operations, "steps_per_second": steps_per_second}
        for kind in ("plain", "fast", "bf16"):
            took = seconds[kind] / count
            rate = rooflines["bf16" if kind == "bf16" else "fast"].rate(seconds)
            figures[name][kind] = {
                "seconds": took, "ratio": seconds["plain"] / seconds[kind], "roofline_share": operations / took / rate,
            }  # fmt: skip
            print(
                f"  {kind:5} {1e3 * took:7.2f} ms, {1 / took:.1f} updates/s, {figures[name][kind]['ratio']:.2f} times "
                f"plain, {figures[name][kind]['roofline_share']:.0%} of the roofline"
            )
    return figures


# World model ---------------------------------------------------------------------------------------------------------
def measure_world_model_test(args: Args) -> dict[str, Any]:
    """Transitions per second in training, compared with PyTorch's own memory format, and the roofline's share."""
    config = world_model_test.stag_hunt.Config()
    games = world_model_test.stag_hunt.collect(4_000, config, 35, ("NS", "NH", "random"), 1)
    data, own = world_model_test.to_transitions(games.arrays, "games"), world_model_test.Args()
    game = world_model_test.find_game(data, data, own)
    models = {name: world_model_test.WorldModel(game, own) for name in ("plain", "fast")}
    models["plain"].to(memory_format=torch.contiguous_format)

    def update(model: world_model_test.WorldModel) -> None:
        model.update(data.select(torch.randint(len(data.obs), (own.batch_size,))))

    works = {name: repeat(lambda model=model: update(model), args.world_updates) for name, model in models.items()}
    roofline = Roofline(torch.float32)
    seconds = medians(args.rounds, works | roofline.works)
    with FlopCounterMode(display=False) as counter:
        update(models["fast"])
    operations, rate = counter.get_total_flops(), roofline.rate(seconds)
    print(
        f"training of --model {own.model}, batch {own.batch_size}, {operations / 1e9:.2f} GFLOP an update, one thread"
    )
    figures: dict[str, Any] = {"operations": operations, "best_rate": rate}
    for name in ("plain", "fast"):
        took = seconds[name] / args.world_updates
        figures[name] = {"transitions_per_second": own.batch_size / took, "roofline_share": operations / took / rate}
        figures[name]["updates_per_second"] = 1.0 / took
        print(
            f"  {name:5} {1e3 * took:6.1f} ms an update, {own.batch_size / took:,.0f} transitions/s, "
            f"{operations / took / rate:.0%} of the roofline"
        )
    return figures


# Pre-trained VAE -----------------------------------------------------------------------------------------------------
class PlainRows(Dataset):
    """The rows as most training scripts read them: one at a time, from arrays, collated by a DataLoader."""

    def __init__(self, records: pretrain_vae_moa.Records) -> None:
        """Look at the arrays of the records."""
        self.arrays, self.rows = records.arrays, records.rows(0)
        self.time_scale, self.board = records.sizes.time_scale, records.batch(torch.zeros(1, dtype=torch.long)).frames

    def __len__(self) -> int:
        """Number of training rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Frame (C + 2, H, W) float32, time, mask (A,) and action of one row."""
        row = self.rows[index]
        frame = np.concatenate((self.arrays["obs"][row].astype(np.float32), self.board[0, -2:].numpy()))
        time_ = np.float32(self.arrays["t"][row] / self.time_scale)
        return frame, time_, self.arrays["action_mask"][row], np.int64(self.arrays["action"][row])


def stag_hunt_speed(args: Args) -> dict[str, float]:
    """Environment steps per CPU-second: many games at once with scripted policies, one game in PettingZoo's form."""
    steps = 0

    def play_many() -> None:
        nonlocal steps
        games, steps = stag_hunt.VectorStagHunt(stag_hunt.Config(), np.arange(2_048)), 0
        for _ in range(18):
            steps += int(games.alive.any(1).sum())
            legal = games.legal()
            probabilities = games.policy_probabilities(("NS", "NH"), legal)
            games.step(games.sample(probabilities[:, :, 0]), legal)

    single, singles = stag_hunt.StagHunt(), 0

    def play_one() -> None:
        nonlocal singles
        singles, generator = 0, np.random.default_rng(0)
        for seed in range(20):
            single.reset(seed=seed)
            while single.agents:
                single.step(dict(zip(single.agents, generator.integers(7, size=len(single.agents)), strict=True)))
                singles += 1

    rows = 20_000
    seconds = medians(args.rounds, {
        "many": play_many, "one": play_one, "collect": lambda: stag_hunt.collect(rows),
    })  # fmt: skip
    return {
        "vector_steps_per_second": steps / seconds["many"], "parallel_env_steps_per_second": singles / seconds["one"],
        "collected_rows_per_second": rows / seconds["collect"],
    }  # fmt: skip


def measure_pretrain_vae_moa(args: Args) -> dict[str, Any]:
    """The game, batches compared with a DataLoader's, and the updates with their share of the matrix-product rate."""
    game = stag_hunt_speed(args)
    print("stag hunt 8x8 with 4 players")
    print(f"  {game['vector_steps_per_second']:9,.0f} environment steps/s, 2,048 games at once with scripted policies")
    print(f"  {game['parallel_env_steps_per_second']:9,.0f} environment steps/s of the PettingZoo environment")
    print(f"  {game['collected_rows_per_second']:9,.0f} rows/s collected, observations and probabilities included")

    data, device = stag_hunt.collect(20_000), torch.device("cpu")
    left, right, out = torch.randn(512, 512), torch.randn(512, 512), torch.empty(512, 512)
    figures: dict[str, Any] = {"game": game}
    for context, objective in (("1", "moa"), ("1", "both"), ("history", "moa")):
        own = pretrain_vae_moa.Args(context=context, objective=objective)
        records = pretrain_vae_moa.Records(data.arrays, data.meta, context, device)
        model = pretrain_vae_moa.MOA(own, records.sizes, device)
        sampler = pretrain_vae_moa.Sampler(records, records.rows(0), own.batch_size, 1)
        counter, cycles = iter(range(10**9)), args.update_cycles

        def draw() -> pretrain_vae_moa.Batch:
            return sampler.batch(next(counter), True)  # noqa: B023  (called in this turn of the loop)

        batch = draw()
        with FlopCounterMode(display=False) as flops:
            model.update(batch)
        works = {
            "batch": repeat(draw, cycles),
            "update": repeat(lambda: model.update(batch), cycles),  # noqa: B023
            "product": repeat(lambda: torch.mm(left, right, out=out), cycles),
        }
        if (context, objective) == ("1", "moa"):
            loader = iter(DataLoader(PlainRows(records), own.batch_size, shuffle=True, drop_last=True))
            plain_cycles = min(cycles, 10)
            works["DataLoader"] = repeat(lambda: next(loader), plain_cycles)  # noqa: B023
            loader_rows = (args.rounds + 1) * plain_cycles * own.batch_size
            assert loader_rows <= len(records.rows(0)), "the loader would run out of rows: take fewer --rounds"
        seconds = medians(args.rounds, works)
        rows = len(batch.time)
        product_rate = 2.0 * 512**3 * cycles / seconds["product"]
        found = {
            "rows_per_second": rows * cycles / (seconds["batch"] + seconds["update"]),
            "updates_per_second": cycles / (seconds["batch"] + seconds["update"]),
            "batch_share": seconds["batch"] / (seconds["batch"] + seconds["update"]),
            "roofline_share": flops.get_total_flops() * cycles / seconds["update"] / product_rate,
            "operations_per_row": flops.get_total_flops() / rows, "product_operations_per_second": product_rate,
        }  # fmt: skip
        if "DataLoader" in seconds:
            found["batches_faster"] = seconds["DataLoader"] / plain_cycles / (seconds["batch"] / cycles)
        figures[f"{objective}, context {context}"] = found
        print(f"--objective {objective} --context {context}, batches of about {own.batch_size} rows, with augmentation")
        print(
            f"  {found['rows_per_second']:9,.0f} rows/s, of which batches take {found['batch_share']:.1%}; "
            f"updates reach {found['roofline_share']:.0%} of the roofline "
            f"({found['operations_per_row'] / 1e6:.1f} million operations a row; products of 512x512x512 at "
            f"{product_rate / 1e9:.0f} GFLOP/s)"
        )
        if "batches_faster" in found:
            print(
                f"  a DataLoader over the same rows, not augmented, takes {found['batches_faster']:.1f} times as long"
            )
    return figures


# Each prints its figures and returns them; add a script's own here.
MEASUREMENTS: dict[str, Callable[[Args], dict[str, Any]]] = {
    "hyar_td3": measure_hyar_td3,
    "sac_ae_pixels": measure_sac_ae_pixels,
    "pretrain_vae_moa": measure_pretrain_vae_moa,
    "plas_pixels": measure_plas_pixels,
    "world_model_test": measure_world_model_test,
}


# One table for all scripts ------------------------------------------------------------------------------------------
SHORT_RUNS = {  # a run of seconds, whose peak memory is measured: the networks and batches are the default run's
    "hyar_td3": "--env Platform-v0 --random-episodes 500 --vae-pretrain-steps 500 --total-timesteps 1000",
    "sac_ae_pixels": "--env cartpole-swingup --learning-starts 20 --total-timesteps 240 --eval-episodes 1",
    "plas_pixels": "--env DotHazard-v0 --collect-steps 15000 --total-timesteps 100 --eval-episodes 2",
    "pretrain_vae_moa": "--total-timesteps 50 --eval-episodes 10",
    "world_model_test": "--total-timesteps 50 --test-rows 2000 --eval-episodes 10",
}


def summary(script: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """A script's main figures: a row for each kind of update, with a rate of environment steps if one was measured."""

    def row(update: str, steps: float | None, updates: float, ratio: float | None, roofline: float) -> dict[str, Any]:
        return {"update": update, "steps": steps, "updates": updates, "ratio": ratio, "roofline": roofline}

    if script == "hyar_td3":
        steps, updates = figures["environments"]["Platform-v0"]["steps_per_second"], figures["updates"]
        fast = updates["fast"]
        return [row("Platform, batch 128", steps, fast["updates_per_second"], updates["ratio"], fast["roofline_share"])]
    if script == "sac_ae_pixels":
        task, lines = next(iter(figures["environments"].values())), []
        steps = task["action_repeat"] / task["fast"]
        for kind, name in (("fast", figures["pictures"]), ("bf16", "the same with `--bf16`")):
            found = figures["updates"][kind]
            lines.append(row(name, steps, 1.0 / found["seconds"], found["ratio"], found["roofline_share"]))
        return lines
    if script == "plas_pixels":
        lines = []
        for size, pictures in figures.items():
            for kind, name in (("fast", size), ("bf16", f"{size} with `--bf16`")):
                found, steps = pictures[kind], pictures["steps_per_second"]
                lines.append(row(name, steps, 1.0 / found["seconds"], found["ratio"], found["roofline_share"]))
        return lines
    if script == "pretrain_vae_moa":
        lines, steps = [], figures["game"]["vector_steps_per_second"]
        for name, found in figures.items():
            if name != "game":
                share, faster = found["batch_share"], found.get("batches_faster")
                ratio = faster and faster * share + 1.0 - share
                lines.append(row(name, steps, found["updates_per_second"], ratio, found["roofline_share"]))
        return lines
    fast, plain = figures["fast"], figures["plain"]
    ratio = fast["updates_per_second"] / plain["updates_per_second"]
    return [row("`--model entity`", None, fast["updates_per_second"], ratio, fast["roofline_share"])]


def peak_memory(script: str) -> int:
    """Peak memory, in bytes, of a short run of the script in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"{script}.py"), "--runs-dir", folder, *shlex.split(SHORT_RUNS[script])]
        command += ["--data-dir", folder] if script == "pretrain_vae_moa" else []
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status != 0:
            raise RuntimeError(f"{shlex.join(command)} failed: {errors.strip()[-300:]}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def where_measured() -> dict[str, str]:
    """The machine and the code that figures belong to."""
    machine = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), machine)

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "*.py")  # results that were just written do not count
    commit = (git("rev-parse", "--short=7", "HEAD") or "no git") + (" with changes" if changed else "")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"machine": f"{machine}, {os.cpu_count()} cores", "commit": commit, **versions}


def main(args: Args) -> None:
    """Measure one script."""
    if args.script not in MEASUREMENTS:
        print(f"error: no measurement of {args.script}; there are {', '.join(MEASUREMENTS)}", file=sys.stderr)
        raise SystemExit(2)
    torch.manual_seed(1)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    torch.use_deterministic_algorithms(True)  # as the scripts do by default
    if args.keep_freed_memory:
        sac_ae_pixels.keep_freed_memory()
    figures = MEASUREMENTS[args.script](args)
    if args.json:
        own = {"script": args.script, **where_measured(), "rows": summary(args.script, figures)}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(own | figures, indent=1) + "\n")  # before a run that can fail
        if args.memory:
            own["peak_memory"] = peak_memory(args.script)
            print(f"a short run takes {own['peak_memory'] / 2**20:,.0f} MiB at most")
            args.json.write_text(json.dumps(own | figures, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
