"""Where does a policy of plas_pixels.py leave its data? Its cloned actions beside a clone that sees the true state.

    python benchmark/plas_clone.py runs/NAME
    python benchmark/plas_clone.py runs/NAME --model model.pt --dataset data/medium.npz --episodes 10

The dataset needs the column `state`, which benchmark/plas_data.py and --collect write. A small network is trained to
predict the data's actions from states. Then three policies play the run's own evaluation episodes: this network, what
the VAE decodes from z = 0, and the run's policy. The table shows for each

- the squared error of its actions on the last tenth of the data's episodes. Only the clone from states has not been
  trained on them. The exploration noise of the data is a part of each error;
- its return;
- the share of its steps that are outside of the data: the state's distance to the nearest of the data's (in standard
  deviations of each dimension) is larger than for all but one in a hundred of the last tenth's states;
- the median, over episodes, of the first such step.

A line below says how far z moves an action: the standard deviation of decoded actions over z, uniform within the
policy's bounds. If the KL term is strong and the data's noise weak, the VAE ignores z, and the policy can only clone.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from scipy.spatial import cKDTree
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plas_pixels
from benchmark import evaluate
from benchmark.plot import markdown, usage_error

HIDDEN, BATCH_SIZE, LEARNING_RATE = 256, 256, 1e-3
DRAWS = 16  # of z for each observation
ROWS = 4_000  # of the held-out tenth on which the policies that see pictures are scored


@dataclass
class Args:
    """What to compare."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run folder"""
    model: str = "model.pt"
    """model.pt (from the end of training) or best_model.pt (from the best evaluation)"""
    dataset: Path | None = None
    """the npz file with the data's states (default: the run's --dataset)"""
    episodes: int = 10
    """episodes that each policy plays"""
    steps: int = 3_000
    """gradient steps of the clone from states"""
    seed: int = 1
    """seed of the clone from states"""


def clone(states: Tensor, actions: Tensor, args: Args) -> torch.nn.Sequential:
    """A network that predicts actions (N, A) from states (N, S); its learning rate falls to 0."""
    network = plas_pixels.mlp(states.shape[1], HIDDEN, actions.shape[1])
    optimizer = torch.optim.Adam(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, args.steps)
    for _ in range(args.steps):
        index = torch.randint(len(states), (BATCH_SIZE,))
        loss = F.mse_loss(network(states[index]), actions[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def read(path: Path, env: plas_pixels.PixelEnv) -> tuple[plas_pixels.Dataset, np.ndarray]:
    """The dataset, and the state (N, S) before each transition. Exits 2 if the file has none."""
    try:
        dataset = plas_pixels.load(path, env)[0]
        with np.load(path) as file:
            states = file["state"]
        if not states.size:
            raise ValueError("its states have no numbers")
    except (ValueError, KeyError, OSError) as error:
        usage_error(f"{path}: {error}; name an npz file with the column state, which benchmark/plas_data.py writes")
    return dataset, states[dataset.rows - 1]


def episode_of(env: plas_pixels.PixelEnv, act: Callable, scaled: Callable, seed: int) -> tuple[np.ndarray, float]:
    """The states (T + 1, S) and the return of an episode; `act` gets the observation and the scaled state before it."""
    visited, total = [], 0.0

    def choose(observation: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(scaled(visited[-1]))[None]
        return act(torch.from_numpy(observation)[None], state)[0].numpy()

    for _, _, reward, _, _, state in plas_pixels.play(env, choose, seed):
        visited.append(state)
        total += reward
    return np.array(visited), total


@torch.no_grad()
def main(args: Args) -> None:
    """Train the clone, play, and print the table."""
    torch.set_num_threads(1)
    if args.episodes < 1 or args.steps < 1:
        usage_error(f"--episodes {args.episodes} --steps {args.steps}: expected at least one of each")
    agent = evaluate.load_agent(args.run / args.model)
    if not isinstance(agent, plas_pixels.PLAS) or agent.args.policy != "latent":
        usage_error(f"{args.run} is not a run of plas_pixels.py with --policy latent")
    env = plas_pixels.make_env(agent.args)
    settings = agent.args
    named = Path("data") / f"{settings.env_id}_{settings.dataset}_{settings.collect_steps}.npz"  # Dot Hazard's own
    dataset, states = read(args.dataset or (named if named.exists() else Path(settings.dataset)), env)
    episode = np.searchsorted(dataset.starts, dataset.rows.numpy(), side="right") - 1
    held_out = episode >= 0.9 * len(dataset.starts)
    if held_out.all() or not held_out.any():
        usage_error(f"{args.run}: expected at least two episodes of data")
    center, width = states[~held_out].mean(0), states[~held_out].std(0) + 1e-6

    def scaled(states: np.ndarray) -> np.ndarray:
        return ((states - center) / width).astype(np.float32)

    torch.manual_seed(args.seed)
    known = torch.from_numpy(scaled(states[~held_out]))
    with torch.enable_grad():
        network = clone(known, dataset.action[~held_out], args)
    nearest = cKDTree(known.numpy())
    limit = np.quantile(nearest.query(scaled(states[held_out]))[0], 0.99)

    def decode(observation: Tensor, cloned: bool) -> Tensor:
        with agent.autocast():
            feature = agent.vae_encoder(observation)
            z = torch.zeros(len(feature), agent.vae.latent_dim) if cloned else agent.policy(feature)
            return agent.vae.decode(feature, z).float()

    policies: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "cloned from states": lambda _, state: network(state).clamp(-1.0, 1.0),
        "cloned from pictures (z = 0)": lambda observation, _: decode(observation, True),
        "the policy": lambda observation, _: decode(observation, False),
    }
    index = torch.from_numpy(held_out.nonzero()[0])
    index = index[torch.randperm(len(index))[:ROWS]]
    lines, errors = [], []
    for name, act in policies.items():
        parts = [
            F.mse_loss(
                act(dataset.batch(part).observation, torch.from_numpy(scaled(states[part]))),
                dataset.action[part], reduction="none",
            )
            for part in index.split(250)
        ]  # fmt: skip
        returns, outside, first = [], [], []
        for i in range(args.episodes):
            visited, total = episode_of(env, act, scaled, plas_pixels.episode_seed(agent.args.seed, i, stream=1))
            far = nearest.query(scaled(visited))[0] > limit
            returns.append(total)
            outside.append(far.mean())
            first.append(far.argmax() if far.any() else np.inf)
        errors.append(float(torch.cat(parts).mean()))
        spread = f"{np.mean(returns):.0f} ± {np.std(returns):.0f}"
        start = f"{np.median(first):.0f}" if np.median(first) < np.inf else "none"
        lines.append([name, f"{errors[-1]:.3f}", spread, f"{np.mean(outside):.0%}", start])
    header = ["", "squared error on the data", "return", "steps outside of the data", "first such step"]
    own = f"{args.episodes} of the run's own episodes"
    print(f"{args.run / args.model}, {own}; the data's return: {dataset.returns.mean():.0f}")
    print(markdown(header, lines))
    observation = dataset.batch(index[:250]).observation
    with agent.autocast():
        feature = agent.vae_encoder(observation).repeat(DRAWS, 1)
        z = agent.policy.bound * (2.0 * torch.rand(len(feature), agent.vae.latent_dim) - 1.0)
        moved = agent.vae.decode(feature, z).float().view(DRAWS, len(observation), -1).std(0).mean()
    noise = errors[0] ** 0.5
    print(f"z moves an action by {moved:.3f}; the data's actions differ by {noise:.3f} from the clone from states")


if __name__ == "__main__":
    main(tyro.cli(Args))
