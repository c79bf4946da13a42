"""Draw pictures of what HyAR-TD3's latent space holds, from a run's model, into the run's folder.

    python benchmark/latent.py runs/NAME
    python benchmark/latent.py runs/NAME --model best_model.pt

`latent_alternatives.png`: each action's parameters, decoded from the prior and from around the policy's z.
`latent_interpolation.png`: what is decoded along the way from one latent action to another.
`embedding.png`: where each action's embedding began and where it is now, in the two principal directions.

The first two show one state: the first of the run's evaluations.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hyar_td3
from benchmark.evaluate import load_agent
from benchmark.plot import usage_error
from hyar_td3 import HyARTD3


@dataclass
class Args:
    """What to draw."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run folder, which the pictures are written to"""
    model: str = "model.pt"
    """model.pt (from the end of training) or best_model.pt (from the best evaluation)"""


def decode(agent: HyARTD3, observation: Tensor, k: Tensor, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (N, P) and predicted state changes (N, S) of actions k (N,) with the policy's z (N, d2)."""
    states = observation.expand(len(z), -1)
    x, change = agent.vae.select_parameter_action(states, k, z), agent.vae.select_delta_state(states, k, z)
    return x.numpy(), change.numpy()


def draw_alternatives(agent: HyARTD3, names: list[str], observation: Tensor) -> Figure:
    """Histograms of decoded parameters, in one state (S,): z from the prior, and near the policy's; at most 24."""
    panels = [(int(k), int(p)) for k, p in agent.mask.nonzero()][:24]
    columns = min(6, len(panels))
    rows = math.ceil(len(panels) / 6)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.0 * rows + 0.5), layout="constrained")
    figure.suptitle("Parameters decoded from the prior and from around the policy's z")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    generator = torch.Generator().manual_seed(0)
    own = agent.actor(observation[None])[:, agent.embedding_dim :]
    near = (own + 0.1 * torch.randn(500, agent.latent_dim, generator=generator)).clamp(-1.0, 1.0)
    prior = agent.vae.to_policy(torch.randn(500, agent.latent_dim, generator=generator))
    for axis, (k, p) in zip(axes, panels, strict=False):
        for label, z in (("prior", prior), ("policy's z + N(0, 0.1)", near)):
            x, _ = decode(agent, observation, torch.full((500,), k), z)
            axis.hist(x[:, p], np.linspace(-1, 1, 41), alpha=0.6, label=label)
        axis.set(title=f"{names[k]}, parameter {p}", xlabel="parameter in [-1, 1]", ylabel="samples of 500")
    axes[0].legend(fontsize=8)
    for axis in axes[len(panels) :]:
        axis.remove()
    return figure


def draw_interpolation(agent: HyARTD3, names: list[str], observation: Tensor) -> Figure:
    """Decoded action, parameters and state change on the way from the first action at z = -1 to the last at z = 1."""
    table, last = agent.vae.discrete_embedding(), len(names) - 1
    ends = [torch.cat((table[k], torch.full((agent.latent_dim,), z))) for k, z in ((0, -1.0), (last, 1.0))]
    share = torch.linspace(0.0, 1.0, 101)
    path = torch.lerp(*ends, share[:, None])
    k = agent.vae.select_discrete_action(path[:, : agent.embedding_dim])
    x, change = decode(agent, observation, k, path[:, agent.embedding_dim :])
    largest = np.argsort(-np.ptp(change, axis=0))[:5].tolist()
    figure = Figure(figsize=(11.4, 3.5), layout="constrained")
    figure.suptitle(f"On the way from {names[0]}, z = -1 to {names[last]}, z = 1")
    first, second, third = figure.subplots(1, 3)
    first.plot(share, k, drawstyle="steps-mid")
    first.set(ylabel="decoded discrete action", yticks=sorted(set(k.tolist())))
    second.plot(share, x, label=[f"parameter {p}" for p in range(x.shape[1])])
    second.set(ylabel="decoded parameters", ylim=(-1.05, 1.05))
    third.plot(share, change[:, largest], label=[f"observation {i}" for i in largest])
    third.set(ylabel="predicted state change (scaled)")
    for axis in (first, second, third):
        axis.set(xlabel="share of the way")
    for axis in (second, third):
        axis.legend(fontsize=8)
    return figure


def draw_embedding(agent: HyARTD3, names: list[str]) -> Figure:
    """The embedding table from its start to its end, in the two directions in which it varies most."""
    tables = torch.stack((agent.initial_embedding, agent.vae.discrete_embedding())).double()
    centered = tables - tables.mean((0, 1))
    directions = torch.linalg.svd(centered.flatten(0, 1), full_matrices=False).Vh
    paths = (centered @ directions[:2].T).numpy()  # (2, K, 2)
    figure = Figure(figsize=(7.0, 4.5), layout="constrained")
    figure.suptitle("Embedding of the discrete actions, from the start (thin end) to the end (dot)")
    axis = figure.subplots()
    shown = min(len(names), 64)
    for k in range(shown):
        x, y = paths[:, k, 0], paths[:, k, -1]
        axis.plot(x, y, color=f"C{k % 10}", linewidth=1)
        axis.scatter(x[-1:], y[-1:], color=f"C{k % 10}", s=30, label=f"{k}: {names[k]}")
        axis.annotate(str(k), (x[-1], y[-1]), textcoords="offset points", xytext=(5, 4))
    figure.legend(loc="outside center right", fontsize=8, ncols=1 + shown // 17)
    axis.set(xlabel="first main direction", ylabel="second main direction")
    axis.margins(0.25)
    return figure


@torch.no_grad()
def main(args: Args) -> None:
    """Draw all pictures and print their paths. Exits 2 if the model is not one of HyAR-TD3."""
    agent = load_agent(args.run / args.model)
    if not isinstance(agent, HyARTD3):
        usage_error(
            f"{args.run / args.model} is a model of {type(agent).__module__}.py; only those of hyar_td3.py have these"
        )
    env = hyar_td3.make_env(agent.args, agent.scale)
    names = hyar_td3.action_names(env)
    start, _ = env.reset(seed=hyar_td3.episode_seed(agent.args.seed, 0, stream=1))
    observation = torch.from_numpy(start)
    figures = {
        "latent_alternatives": draw_alternatives(agent, names, observation),
        "latent_interpolation": draw_interpolation(agent, names, observation),
        "embedding": draw_embedding(agent, names),
    }
    for name, figure in figures.items():
        path = args.run / f"{name}.png"
        figure.savefig(path, dpi=110)
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
