"""Weights at rest: importing a checkpoint, the model directory, and reading it back."""
