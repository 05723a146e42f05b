"""Plans: what lives where, in batches of what size. No torch."""
