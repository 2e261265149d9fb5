"""The generation fields, and the merging of keywords and configs into the configuration of a call; runs on the host."""
