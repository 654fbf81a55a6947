"""integrations._host."""
