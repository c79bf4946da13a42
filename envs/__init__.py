"""Hybrid-action environments. Importing this package registers their ids with Gymnasium."""

from gymnasium.envs.registration import register

register("Platform-v0", entry_point="envs.platform:PlatformEnv")
