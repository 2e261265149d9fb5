"""Host code: turns the arguments of `generate` into a call, and the arrays of a call into outputs."""
