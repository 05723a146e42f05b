"""Tiers with byte budgets, and the lanes that move bytes between them."""
