"""Play fresh episodes with a saved model of HyAR-TD3, SAC+AE or PLAS and print how well it does.

    python benchmark/evaluate.py runs/NAME
    python benchmark/evaluate.py runs/NAME --model model.pt --episodes 1000
    python benchmark/evaluate.py runs/NAME --at-least 0.9
    python benchmark/evaluate.py runs/NAME --still --own-episodes
    python benchmark/evaluate.py runs/NAME --cloned
    python benchmark/evaluate.py benchmark/pretrained/Platform-v0 --video videos

The third exits with status 1 if the mean return is below 0.9. The fourth shows what a policy that does nothing gets in
a SAC+AE run's own evaluation episodes; the fifth, what PLAS's VAE has cloned of the behaviour policy, on which the
trained policy should improve. The last plays and records a trained model that comes with the project.
"""

import json
import math
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import hyar_td3
import plas_pixels
import sac_ae_pixels
from benchmark.plot import usage_error


@dataclass
class Args:
    """What to play."""

    run: Annotated[Path, tyro.conf.Positional]
    """the run folder"""
    model: str = "best_model.pt"
    """best_model.pt (from the best evaluation) or model.pt (from the end of training)"""
    episodes: int = 100
    """how many episodes to play"""
    seed: int = 12345
    """their seed; none of them occurs in the run's training or evaluations"""
    own_episodes: bool = False
    """if toggled, play the first of the run's own evaluation episodes instead of fresh ones"""
    at_least: float | None = None
    """exit with status 1 if the mean return is below this"""
    average: bool = True
    """if toggled, play the moving average of HyAR-TD3's policy, by which its best model is chosen"""
    still: bool = False
    """if toggled, play actions of 0 instead of SAC+AE's policy"""
    cloned: bool = False
    """if toggled, play what PLAS's VAE decodes from z = 0 instead of its policy"""
    video: Path | None = None
    """a new folder, to which mp4 videos of the policy's first three episodes are written"""
    export: Path | None = None
    """a new file for what HyAR-TD3 needs to play: its averaged policy and its decoder"""


Agent = hyar_td3.HyARTD3 | sac_ae_pixels.SACAE | plas_pixels.PLAS


def load_agent(path: Path) -> Agent:
    """Rebuild the agent of a model file, on the CPU, from the arguments that the file holds. Exits 2 if that fails."""
    if not path.is_file():
        usage_error(f"there is no model {path}; a run writes it at its first evaluation (see --model)")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        settings = json.loads(content.pop("arguments"))
        of_plas, of_sac_ae = "encoder_signal" in settings, "action_dim" in content
        script = plas_pixels if of_plas else sac_ae_pixels if of_sac_ae else hyar_td3
        known = {field.name for field in fields(script.Args)}
        settings = {name: value for name, value in settings.items() if name in known}  # older models have more
        args = script.Args(**settings)
    except Exception as error:  # a damaged file raises nearly anything
        usage_error(f"{path} is not a model of hyar_td3, sac_ae_pixels or plas_pixels ({type(error).__name__})")
    try:
        env = plas_pixels.make_env(args) if of_plas else None if of_sac_ae else hyar_td3.make_env(args)
    except ValueError as error:
        usage_error(str(error))
    try:
        if of_plas:
            agent = plas_pixels.PLAS(args, env, torch.device("cpu"))
            agent.load_state_dict(content["agent"])
        elif of_sac_ae:
            size = tuple(content.get("size", (args.image_size, args.image_size)))
            agent = sac_ae_pixels.SACAE(args, size, content["action_dim"], torch.device("cpu"))
            for name in ("actor", "critic"):
                getattr(agent, name).load_state_dict(content[name])
        else:
            agent = load_hyar_td3(content, args, env)
    except Exception as error:
        usage_error(f"{path} does not fit {args.env_id} as it is here ({type(error).__name__})")
    return agent


def load_hyar_td3(content: dict[str, Any], args: hyar_td3.Args, env: hyar_td3.HybridEnv) -> hyar_td3.HyARTD3:
    """The agent, with the observations' scale in `agent.scale`; also reads models from before it was one module."""
    agent = hyar_td3.HyARTD3(args, env, torch.device("cpu"))
    if "agent" not in content:
        parts = {"average_actor": content["actor"], **content}  # the oldest have no average
        content["agent"] = {
            f"{part}.{name.removeprefix('network.')}": value
            for part in ("actor", "average_actor", "vae")
            for name, value in parts[part].items()
        }
        table = content["vae"]["embedding_table"]  # its initial value is not known
        content["agent"]["initial_embedding"] = table if args.discrete_embedding == "one-hot" else torch.tanh(table)
        content["width"] = content["scale"]
    plays = ("actor", "average_actor", "vae", "initial_embedding")
    weights = {name: value for name, value in content["agent"].items() if name.split(".")[0] in plays}
    agent.load_state_dict({**agent.state_dict(), **weights})
    agent.exported = "actor.0.weight" not in weights
    env.scale.center, env.scale.width = content["center"].numpy(), content["width"].numpy()
    agent.scale = env.scale
    return agent


def export(path: Path, model: Path) -> None:
    """Write what the averaged policy of HyAR-TD3 needs for playing, from a model file. Exits 2 for another script's."""
    content = torch.load(model, map_location="cpu", weights_only=True)
    parts = ("average_actor.", "initial_embedding", "mask", "vae.decoder", "vae.parameter_head", "vae.latent")
    parts += ("vae.embedding_table",)
    if "center" not in content or "agent" not in content:
        usage_error(f"--export is for models that the current hyar_td3.py writes; {model} is not one")
    content["agent"] = {name: value for name, value in content["agent"].items() if name.startswith(parts)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "xb") as file:
            torch.save(content, file)
    except OSError as error:
        usage_error(f"cannot write --export {path}: {error.strerror}; choose another place")
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, for playing alone")


def film(agent: Agent, folder: Path, seed: int) -> None:
    """Write videos of the first three episodes that have this seed."""
    settings = replace(agent.args, seed=seed, eval_episodes=3)
    if isinstance(agent, hyar_td3.HyARTD3):
        videos = hyar_td3.record_videos(agent, settings, agent.scale, folder)
    elif isinstance(agent, plas_pixels.PLAS):
        videos = plas_pixels.record_videos(agent, settings, folder)
    else:
        videos = sac_ae_pixels.record_videos(agent, settings, folder, 0)
    print("videos:", *videos)


def play(agent: Agent, args: Args, seed: int) -> tuple[dict[str, float], str]:
    """What `evaluate` of the agent's script returns, and the policy's name. Exits 2 if there is no environment."""
    for flag, asked, script in (("still", args.still, sac_ae_pixels.SACAE), ("cloned", args.cloned, plas_pixels.PLAS)):
        if asked and not isinstance(agent, script):
            usage_error(f"--{flag} is for models of {script.__module__}.py; leave it out")
    if isinstance(agent, plas_pixels.PLAS):
        if args.cloned:
            agent.args.policy, agent.policy.bound = "latent", 0.0
        environments = [plas_pixels.make_env(agent.args) for _ in range(args.episodes)]
        policy = "cloned actions (z = 0)" if args.cloned else "the policy"
        return plas_pixels.evaluate(agent, environments, seed), policy
    if isinstance(agent, hyar_td3.HyARTD3):
        environments = [hyar_td3.make_env(agent.args, agent.scale) for _ in range(args.episodes)]
        if agent.exported and not args.average:
            usage_error("this model was exported for playing its averaged policy; leave out --no-average")
        if args.video and not args.average:
            usage_error("--video shows the averaged policy; leave out --no-average")
        policy = "the policy's moving average" if args.average else "the actor"
        return hyar_td3.evaluate(agent, environments, seed, average=args.average), policy
    try:
        env = sac_ae_pixels.make_env(agent.args)
    except ValueError as error:
        usage_error(str(error))
    if args.still:
        agent.act = lambda observation, _: np.zeros((len(observation), agent.action_dim), np.float32)
    result = sac_ae_pixels.evaluate(agent, [env] * args.episodes, seed)
    return result, "actions of 0" if args.still else "the policy's mean"


def main(args: Args) -> None:
    """Play and print; exits 1 if the mean return is not as high as asked for."""
    for name, value, least in (("episodes", args.episodes, 1), ("seed", args.seed, 0)):
        if value < least:
            usage_error(f"--{name} {value}: expected at least {least}")
    for flag, new in (("video", args.video), ("export", args.export)):
        if new is not None and new.exists():
            usage_error(f"--{flag} {new} exists already; give a new name, or remove it")
    path = args.run / args.model
    torch.set_num_threads(1)
    agent = load_agent(path)
    if args.export is not None:
        export(args.export, path)
    fresh = hyar_td3.episode_seed(args.seed, agent.args.seed, stream=3)  # a run itself uses streams 0, 1 and 2
    seed = agent.args.seed if args.own_episodes else fresh
    result, policy = play(agent, args, seed)
    mean, kind = result["episodic_return"], "of the run's own" if args.own_episodes else "fresh"
    rate = result.get("success_rate", math.nan)  # not every environment reports it
    success = "" if math.isnan(rate) else f", success rate {rate:.3f}"
    print(f"{path}, {args.episodes} {kind} episodes of {agent.args.env_id}, {policy}:")
    print(f"return {mean:.3f} ± {result['return_std']:.3f}{success}, length {result['episodic_length']:.1f}")
    if args.video is not None:
        film(agent, args.video, seed)
    if args.at_least is not None and not mean >= args.at_least:
        print(f"the mean return {mean:.3f} is below {args.at_least:g}")
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args))
