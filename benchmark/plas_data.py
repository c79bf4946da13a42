"""Make a task's data for plas_pixels.py: pictures of what some policy does.

    python benchmark/plas_data.py --env cartpole-swingup --action-repeat 4 --folder data/cartpole-swingup
    python benchmark/plas_data.py --env cartpole-swingup --collect runs/NAME/model.pt --file data/medium.npz
    python benchmark/plas_data.py --env DotHazard-v0 --collect medium --file data/medium.npz

By default TD3 (Fujimoto et al., ICML 2018, arXiv 1802.09477), which itself sees the task's state, learns in minutes
what takes hours from pixels. `mixed.npz` is all that it does in --steps agent steps of training, including the random
first ones; `medium.npz` is as many steps of its final policy, with exploration noise. `--collect` uses another policy:
uniformly random actions; the script of an environment that has an `expert_action()` (expert), or the same with a
quarter of its actions random and noise of 0.5 on the others (medium); or the mean actions of a model that
sac_ae_pixels.py saved. The same arguments on the same machine give the same files; if they exist, nothing is done. Any
environment that plas_pixels.py supports can be used.
"""

import copy
import itertools
import sys
from collections.abc import Callable
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
import sac_ae_pixels
from benchmark import evaluate

GAMMA, TAU, BATCH_SIZE, LEARNING_RATE, HIDDEN = 0.99, 0.005, 256, 1e-3, 256
EXPLORATION_NOISE, TARGET_NOISE, NOISE_CLIP, POLICY_FREQUENCY = 0.2, 0.2, 0.5, 2


@dataclass
class Args:
    """What to collect."""

    env: Annotated[str, tyro.conf.arg(aliases=["--env-id"])] = "cartpole-swingup"
    """the task"""
    collect: str = "td3"
    """td3 (which learns from states), random, medium, expert (or scripted), or a model.pt of sac_ae_pixels.py"""
    folder: Path = Path("data/cartpole-swingup")
    """the folder to write to: mixed.npz and medium.npz, or with --collect a file of that name"""
    file: Path | None = None
    """the file to write, with --collect (default: in the folder)"""
    steps: int = 15_000
    """agent steps in each file, plus those that complete the last episode"""
    random_steps: int = 1_000
    """how many of the first of them take random actions (td3)"""
    update_every: int = 1
    """agent steps per gradient step (td3): with 7, 100,000 steps have as many gradient steps as 15,000 otherwise"""
    image_size: int = 64
    """height and width of the pictures"""
    action_repeat: int | None = None
    """environment steps for which an action is repeated (default: plas_pixels.py's for the task)"""
    frame_stack: int | None = None
    """pictures in a model's observation (default: plas_pixels.py's for the task)"""
    camera: int | None = None
    """the camera of dm_control (default: plas_pixels.py's for the task)"""
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
        """An action (A,) with exploration noise."""
        action = torch.tanh(self.actor(torch.from_numpy(state.astype(np.float32))))
        return (action + EXPLORATION_NOISE * torch.randn_like(action)).clamp(-1.0, 1.0).numpy()

    def update(self, step: int) -> None:
        """One step of the critics and, every second time, of the actor and the targets."""
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
    """Columns of whole episodes, `args.steps` steps or a few more, from which the agent learns if `training`."""
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
                    if steps > args.random_steps and steps % args.update_every == 0:
                        agent.update(steps // args.update_every)
            if steps >= args.steps:
                break
    return plas_pixels.as_columns(rows)


def sac_ae_policy(path: Path, env: plas_pixels.PixelEnv) -> Callable[[np.ndarray], np.ndarray]:
    """The mean action of a model that sac_ae_pixels.py saved. Raises ValueError if it does not fit `env`."""
    agent = evaluate.load_agent(path)
    if not isinstance(agent, sac_ae_pixels.SACAE):
        raise ValueError(f"{path} is not a model of sac_ae_pixels.py")
    settings = ("image_size", "frame_stack", "action_repeat", "camera")  # its task may differ
    plas_pixels.check_settings(path, {name: getattr(agent.args, name) for name in settings}, env)
    if agent.action_dim != env.action_dim:
        raise ValueError(f"{path} has {agent.action_dim} actions, the environment {env.action_dim}")
    if agent.args.residual_action:
        raise ValueError(f"{path} was trained with --residual-action, which collecting does not support; take another")
    unseen = np.zeros((1, agent.action_dim), np.float32)  # such a policy ignores the previous action
    return lambda observation: agent.act(observation[None], unseen)[0]


def behaviour(name: str, generator: np.random.Generator, env: plas_pixels.PixelEnv) -> Callable:
    """A policy (observation) -> action (A,) by its name. Raises ValueError if there is none."""
    uniform = plas_pixels.uniform(env, generator)

    def expert(_: np.ndarray) -> np.ndarray:
        return env.unwrapped.expert_action()  # in [-1, 1], whatever the environment's bounds

    def medium(observation: np.ndarray) -> np.ndarray:
        noisy = expert(observation) + 0.5 * generator.standard_normal(env.action_space.shape)
        return uniform(observation) if generator.random() < 0.25 else noisy.clip(-1.0, 1.0).astype(np.float32)

    known = {"random": uniform, "medium": medium, "expert": expert, "scripted": expert}
    if name in known:
        if name != "random" and not hasattr(env.unwrapped, "expert_action"):
            raise ValueError(f"{env.unwrapped} has no expert_action; take --collect random, td3 or a model.pt")
        return known[name]
    if not Path(name).is_file():
        raise ValueError(f"--collect {name}: expected td3, random, medium, expert or a model.pt")
    return sac_ae_policy(Path(name), env)


def write(path: Path, env: plas_pixels.PixelEnv, columns: dict[str, np.ndarray], **about: Any) -> None:
    """Write a file for plas_pixels.py, and print its returns."""
    plas_pixels.write_columns(path, env, columns, **about)
    returns = np.add.reduceat(columns["reward"], columns["is_first"].nonzero()[0])
    print(f"{path}: {len(returns)} episodes, return {returns.mean():.1f} ± {returns.std():.1f}")


def main(args: Args) -> None:
    """Write the files, unless they exist."""
    paths = [args.folder / "mixed.npz", args.folder / "medium.npz"]
    if args.collect != "td3":
        paths = [args.file or args.folder / f"{Path(args.collect).stem}.npz"]
    if all(path.exists() for path in paths):
        return print(f"{args.folder if args.collect == 'td3' else paths[0]} is complete")
    torch.set_num_threads(1)  # small networks gain nothing from more
    try:
        if args.collect == "td3" and not 0 < args.random_steps < args.steps:
            given = f"--random-steps {args.random_steps} of --steps {args.steps}"
            raise ValueError(f"{given}: expected at least one random step, and fewer than --steps")
        if args.update_every < 1:
            raise ValueError(f"--update-every {args.update_every}: expected at least 1")
        if args.collect == "td3" and args.file:
            raise ValueError(f"--file {args.file}: td3 writes two files, name a --folder")
        settings = plas_pixels.Args(
            env_id=args.env, image_size=args.image_size, action_repeat=args.action_repeat, seed=args.seed,
            frame_stack=args.frame_stack, camera=args.camera, collect_steps=args.steps,
            collect="random",  # so that its size is checked
        )  # fmt: skip
        plas_pixels.check(settings)
        env = plas_pixels.make_env(settings)
        torch.manual_seed(args.seed)
        if args.collect != "td3":
            act = behaviour(args.collect, np.random.default_rng(args.seed), env)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        if args.collect != "td3":
            columns = plas_pixels.collect(env, args.steps, args.seed, act=act)
            first_seed = plas_pixels.episode_seed(args.seed, 0, stream=4)
            return write(paths[0], env, columns, collect=args.collect, first_seed=first_seed)
        _, info = env.reset(seed=0)
        agent = TD3(info["state"].size, env.action_dim, args.steps)
        for path in paths:
            columns = record(env, agent, args, training=path == paths[0])
            write(path, env, columns, collect=path.stem)
    except ValueError as error:
        plas_pixels.usage_error(str(error))
    except OSError as error:
        plas_pixels.usage_error(f"cannot write {paths[0]}: {error.strerror}; choose another --folder or --file")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        print("stopped; what is not written is lost", file=sys.stderr)
        raise SystemExit(130) from None
