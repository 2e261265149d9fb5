"""The device wing: one compiled loop, and the strategies that choose tokens in it."""
