"""Targets, losses and the training loop."""
