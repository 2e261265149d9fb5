"""Checks prompts and arranges them for the programs; runs on the host."""
