"""landscape.permutations."""
