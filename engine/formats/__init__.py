"""How tensors are stored and computed with."""
