"""Keys and values of running sequences over the tiers."""
