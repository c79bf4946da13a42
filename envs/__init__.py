"""Environments that no installable package provides. Importing this package registers their ids."""

import contextlib

from gymnasium.envs.registration import register

register("Platform-v0", entry_point="envs.platform:PlatformEnv")
register("Goal-v0", entry_point="envs.goal:GoalEnv")
register("HardGoal-v0", entry_point="envs.goal:HardGoalEnv")
register("CatchPoint-v0", entry_point="envs.point_mass:CatchPointEnv")
register("HardMove-v0", entry_point="envs.point_mass:HardMoveEnv")
for n in (4, 6, 8, 10):
    register(f"HardMove{n}-v0", entry_point="envs.point_mass:HardMoveEnv", kwargs={"n": n})
register("SimpleMove-v0", entry_point="envs.point_mass:SimpleMoveEnv")
register("DotHazard-v0", entry_point="envs.dot_hazard:DotHazardEnv", max_episode_steps=40)

with contextlib.suppress(ModuleNotFoundError):  # the multi-agent game needs PettingZoo; the others do not
    import pettingzoo

    pettingzoo.register("parallel", "markov_stag_hunt-v0", entry_point="envs.stag_hunt:parallel_env")
    pettingzoo.register("aec", "markov_stag_hunt-v0", entry_point="envs.stag_hunt:env")
    for name, size, stags in (("4p5b8x8", 8, 1), ("4p6b8x8", 8, 2), ("4p5b4x4", 4, 1)):
        sizes = {"size": size, "n_players": 4, "n_stags": stags, "n_hares": 4}
        pettingzoo.register("parallel", f"{name}-v0", entry_point="envs.stag_hunt:parallel_env", kwargs=sizes)
        pettingzoo.register("aec", f"{name}-v0", entry_point="envs.stag_hunt:env", kwargs=sizes)
