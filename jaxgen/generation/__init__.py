"""The host wing: from the arguments of `generate` to a call, and from its arrays back to outputs."""
