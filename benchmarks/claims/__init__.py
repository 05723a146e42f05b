"""Every figure that the documentation states, as something that can be run: ``python -m benchmarks.claims``."""
