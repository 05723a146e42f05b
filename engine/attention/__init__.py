"""Keys and values as tensors, and attention over them: a runner for each kind of device."""
