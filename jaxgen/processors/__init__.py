"""Logits processors and stopping criteria."""
