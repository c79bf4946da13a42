"""Make a task's data for plas_pixels.py: pictures of an agent that itself sees the task's state.

    python benchmark/plas_data.py --env finger-spin --folder data/finger-spin

From states TD3 (Fujimoto et al., ICML 2018, arXiv 1802.09477) learns in minutes what takes hours from pixels.
`mixed.npz` is all that it does in --steps agent steps of training, the random first ones included; `medium.npz` is as
many steps of its last policy, with the noise of its exploration. The same arguments on the same machine give the same
files; nothing is done where both are there. Any environment that plas_pixels.py knows can be named.
"""

import copy
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import plas_pixels  # noqa: E402

GAMMA, TAU, BATCH_SIZE, LEARNING_RATE, HIDDEN = 0.99, 0.005, 256, 1e-3, 256
EXPLORATION_NOISE, TARGET_NOISE, NOISE_CLIP, POLICY_FREQUENCY = 0.2, 0.2, 0.5, 2
COLUMNS = "image", "action", "reward", "discount", "is_first", "state"  # of `plas_pixels.play`


@dataclass
class Args:
    """What to collect."""

    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "finger-spin"
    """the task"""
    folder: Path = Path("data/finger-spin")
    """the folder to write mixed.npz and medium.npz to"""
    steps: int = 15_000
    """agent steps in each file"""
    random_steps: int = 1_000
    """the first of them, with random actions"""
    image_size: int = 64
    """height and width of the pictures"""
    action_repeat: int | None = None
    """environment steps that an action is repeated for (default: plas_pixels.py's for the task)"""
    seed: int = 1
    """seed of agent and episodes"""


class TD3:
    """Actor, twin critics and their targets, on states; transitions are appended to one array."""

    def __init__(self, states: int, actions: int, steps: int) -> None:
        """Room for `steps` transitions: state, action, reward, discount (0 where the task ended), next state."""
        self.actor = plas_pixels.mlp(states, HIDDEN, actions)
        self.critics = nn.ModuleList(plas_pixels.mlp(states + actions, HIDDEN, 1) for _ in range(2))
        self.target_actor, self.target_critics = copy.deepcopy(self.actor), copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), LEARNING_RATE, fused=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), LEARNING_RATE, fused=True)
        self.memory, self.size = torch.zeros(steps, 2 * states + actions + 2), 0
        self.sections = [states, actions, 1, 1, states]

    def add(self, *transition: Any) -> None:
        """Append one transition."""
        self.memory[self.size] = torch.from_numpy(np.hstack(transition).astype(np.float32))
        self.size += 1

    def values(self, critics: nn.ModuleList, state: Tensor, action: Tensor) -> list[Tensor]:
        """Both values (B, 1)."""
        return [critic(torch.cat((state, action), 1)) for critic in critics]

    @torch.no_grad()
    def act(self, state: np.ndarray) -> np.ndarray:
        """An action (A,) with the exploration's noise."""
        action = torch.tanh(self.actor(torch.from_numpy(state.astype(np.float32))))
        return (action + EXPLORATION_NOISE * torch.randn_like(action)).clamp(-1.0, 1.0).numpy()

    def update(self, step: int) -> None:
        """One step of the critics, and, in every second one, of the actor and the targets."""
        index = torch.randint(self.size, (BATCH_SIZE,))
        state, action, reward, discount, following = self.memory[index].split(self.sections, 1)
        with torch.no_grad():
            noise = (TARGET_NOISE * torch.randn_like(action)).clamp(-NOISE_CLIP, NOISE_CLIP)
            next_action = (torch.tanh(self.target_actor(following)) + noise).clamp(-1.0, 1.0)
            target = reward + GAMMA * discount * torch.minimum(
                *self.values(self.target_critics, following, next_action)
            )
        loss = sum(F.mse_loss(value, target) for value in self.values(self.critics, state, action))
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        if step % POLICY_FREQUENCY == 0:
            loss = -self.critics[0](torch.cat((state, torch.tanh(self.actor(state))), 1)).mean()
            self.actor_optimizer.zero_grad()
            loss.backward()
            self.actor_optimizer.step()
            with torch.no_grad():
                for target, online in ((self.target_actor, self.actor), (self.target_critics, self.critics)):
                    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), TAU)


def record(env: Any, args: Args, agent: TD3, training: bool) -> tuple[dict[str, np.ndarray], list[float]]:
    """Play whole episodes for at least `args.steps` steps, and learn from them if told so; columns, and returns."""
    generator = np.random.default_rng(args.seed)
    rows: list[tuple] = []
    returns: list[float] = []
    steps = 0

    def act(*_: Any) -> np.ndarray:
        if training and steps < args.random_steps:
            return generator.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
        return agent.act(rows[-1][-1])

    progress = tqdm(total=args.steps, unit="step", desc="mixed" if training else "medium")
    for episode in itertools.count():
        total = 0.0
        seed = plas_pixels.episode_seed(args.seed, episode, stream=5 if training else 6)
        for row in plas_pixels.play(env, act, seed):
            rows.append(row)
            _, action, reward, discount, is_first, state = row
            if is_first:
                continue
            total, steps = total + reward, steps + 1
            progress.update()
            if training and steps <= args.steps:
                agent.add(rows[-2][-1], action, reward, discount, state)
                if steps > args.random_steps:
                    agent.update(steps)
        returns.append(total)
        progress.set_postfix_str(f"return {total:.1f}")
        if steps >= args.steps:
            progress.close()
            return {name: np.array(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}, returns


def main(args: Args) -> None:
    """Write both files, unless they are there."""
    paths = args.folder / "mixed.npz", args.folder / "medium.npz"
    if all(path.exists() for path in paths):
        return print(f"{args.folder} is complete")
    try:
        settings = plas_pixels.resolve(plas_pixels.Args(
            env_id=args.env, dataset=str(paths[0]), image_size=args.image_size, action_repeat=args.action_repeat
        ))  # fmt: skip
        env = plas_pixels.make_env(settings)
    except ValueError as error:
        plas_pixels.usage_error(str(error))
    torch.manual_seed(args.seed)
    states = env.reset(seed=0)[1]["state"].size
    agent = TD3(states, env.action_space.shape[0], args.steps)
    args.folder.mkdir(parents=True, exist_ok=True)
    about = {"action_repeat": settings.action_repeat, "env_id": env.spec.id}
    for path in paths:
        columns, returns = record(env, args, agent, training=path == paths[0])
        columns["image"] = np.moveaxis(columns["image"], 1, 3)
        plas_pixels.write_atomically(path, lambda file, columns=columns: np.savez_compressed(file, **about, **columns))
        print(f"{path}: {len(returns)} episodes, return {np.mean(returns):.1f} ± {np.std(returns):.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
