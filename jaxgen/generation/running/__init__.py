"""Runs a call, and follows its progress on the host."""
