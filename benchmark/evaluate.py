"""Play fresh episodes with a saved HyAR-TD3 model and print how well it does.

    python benchmark/evaluate.py runs/NAME
    python benchmark/evaluate.py runs/NAME --model model.pt --episodes 1000
    python benchmark/evaluate.py runs/NAME --at-least 0.9

The last one exits with status 1 if the mean return is below 0.9.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from plot import usage_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import hyar_td3


@dataclass
class Args:
    """What to play."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run folder"""
    model: str = "best_model.pt"
    """best_model.pt (of the best evaluation) or model.pt (of the end)"""
    episodes: int = 100
    """how many episodes to play"""
    seed: int = 12345
    """their seed; none of them is an episode of the run's training or evaluations"""
    at_least: float | None = None
    """exit with status 1 if the mean return is below"""
    average: bool = True
    """if toggled, play the moving average of the policy, by which the best model is chosen"""


def load_agent(path: Path) -> hyar_td3.HyARTD3:
    """Rebuild the agent of a model file, on the CPU, from the arguments that the file holds. Exits 2 if it cannot."""
    if not path.is_file():
        usage_error(f"there is no model {path}; a run writes it at its first evaluation (see --model)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        args = hyar_td3.Args(**json.loads(content.pop("arguments")))
    except Exception as error:  # a damaged file raises nearly anything
        usage_error(f"{path} is not a model of hyar_td3.py ({type(error).__name__})")
    try:
        env = hyar_td3.make_env(args.env_id)
    except ValueError as error:
        usage_error(str(error))
    try:
        agent = hyar_td3.HyARTD3(args, env, torch.device("cpu"))
        content.pop("critic", None)  # it does not play
        agent.load_state_dict({"average_actor": content["actor"], **content})  # a model may lack the average
    except Exception as error:
        usage_error(f"{path} does not fit {args.env_id} as it is here ({type(error).__name__})")
    return agent


def main(args: Args) -> None:
    """Play and print; exits 1 if the mean return is not as high as asked for."""
    for name, value, least in (("episodes", args.episodes, 1), ("seed", args.seed, 0)):
        if value < least:
            usage_error(f"--{name} {value}: at least {least} expected")
    path = args.run / args.model
    torch.set_num_threads(1)
    agent = load_agent(path)
    environments = [hyar_td3.make_env(agent.args.env_id) for _ in range(args.episodes)]
    fresh = hyar_td3.episode_seed(args.seed, agent.args.seed, stream=3)  # a run itself uses streams 0, 1 and 2
    result = hyar_td3.evaluate(agent, environments, fresh, average=args.average)
    mean, std, success = (result[name] for name in ("episodic_return", "return_std", "success_rate"))
    policy = "the policy's moving average" if args.average else "the actor"
    print(f"{path}, {args.episodes} fresh episodes of {agent.args.env_id}, {policy}:")
    print(f"return {mean:.3f} ± {std:.3f}, success rate {success:.3f}, length {result['episodic_length']:.1f}")
    if args.at_least is not None and not mean >= args.at_least:
        print(f"the mean return {mean:.3f} is below {args.at_least:g}")
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
