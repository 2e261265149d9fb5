"""Computes the memory and time that a call needs, before anything is loaded."""
