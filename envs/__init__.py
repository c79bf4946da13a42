"""Environments that no installable package has. Importing this package registers their ids with Gymnasium."""

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
