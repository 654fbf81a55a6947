"""landscape.figures."""
