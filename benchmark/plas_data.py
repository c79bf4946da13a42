"""Make a task's data for plas_pixels.py: pictures of an agent that itself sees the task's state.

    python benchmark/plas_data.py --env cartpole-swingup --action-repeat 4 --folder data/cartpole-swingup

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
import plas_pixels

GAMMA, TAU, BATCH_SIZE, LEARNING_RATE, HIDDEN = 0.99, 0.005, 256, 1e-3, 256
EXPLORATION_NOISE, TARGET_NOISE, NOISE_CLIP, POLICY_FREQUENCY = 0.2, 0.2, 0.5, 2


@dataclass
class Args:
    """What to collect."""

    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "cartpole-swingup"
    """the task"""
    folder: Path = Path("data/cartpole-swingup")
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
            value = torch.minimum(*self.values(self.target_critics, following, next_action))
            target = reward + GAMMA * discount * value
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


def record(env: Any, agent: TD3, args: Args, training: bool) -> dict[str, np.ndarray]:
    """Columns of whole episodes, `args.steps` steps or a few more, which the agent learns from if told so."""
    generator = np.random.default_rng(args.seed)
    rows: list[tuple] = []
    steps = 0

    def act(*_: Any) -> np.ndarray:
        if training and steps < args.random_steps:
            return generator.uniform(-1.0, 1.0, env.action_space.shape).astype(np.float32)
        return agent.act(rows[-1][-1])

    with tqdm(total=args.steps, unit="step", desc="mixed" if training else "medium") as progress:
        for episode in itertools.count():
            seed = plas_pixels.episode_seed(args.seed, episode, stream=5 if training else 6)
            for row in plas_pixels.play(env, act, seed):
                rows.append(row)
                _, action, reward, discount, is_first, state = row
                if is_first:
                    continue
                steps += 1
                progress.update()
                if training and steps <= args.steps:
                    agent.add(rows[-2][-1], action, reward, discount, state)
                    if steps > args.random_steps:
                        agent.update(steps)
            if steps >= args.steps:
                break
    return plas_pixels.as_columns(rows)


def main(args: Args) -> None:
    """Write both files, unless they are there."""
    paths = args.folder / "mixed.npz", args.folder / "medium.npz"
    if all(path.exists() for path in paths):
        return print(f"{args.folder} is complete")
    torch.set_num_threads(1)  # small networks gain nothing by more
    try:
        if not 0 < args.random_steps < args.steps:
            given = f"--random-steps {args.random_steps} of --steps {args.steps}"
            raise ValueError(f"{given}: at least one random step, and fewer than steps, expected")
        settings = plas_pixels.resolve(plas_pixels.Args(
            env_id=args.env, image_size=args.image_size, action_repeat=args.action_repeat, seed=args.seed
        ))  # fmt: skip
        env = plas_pixels.make_env(settings)
        args.folder.mkdir(parents=True, exist_ok=True)
    except ValueError as error:
        plas_pixels.usage_error(str(error))
    except OSError as error:
        plas_pixels.usage_error(f"cannot make {args.folder}: {error.strerror}; choose another --folder")
    torch.manual_seed(args.seed)
    _, info = env.reset(seed=0)
    agent = TD3(info["state"].size, env.action_space.shape[0], args.steps)
    for path in paths:
        columns = record(env, agent, args, training=path == paths[0])
        columns |= {"action_repeat": settings.action_repeat, "env_id": env.spec.id}
        plas_pixels.write_atomically(path, lambda file, columns=columns: np.savez_compressed(file, **columns))
        returns = np.add.reduceat(columns["reward"], columns["is_first"].nonzero()[0])
        print(f"{path}: {len(returns)} episodes, return {returns.mean():.1f} ± {returns.std():.1f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
