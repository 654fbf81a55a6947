"""integrations._lightning."""
