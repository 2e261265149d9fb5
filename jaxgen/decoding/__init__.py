"""Device code: the compiled decode loop, and the strategies that choose tokens in it."""
