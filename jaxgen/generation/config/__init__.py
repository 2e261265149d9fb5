"""Host: the generation fields, and how keywords and configs are merged into the configuration of a call."""
