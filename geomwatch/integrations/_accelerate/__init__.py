"""integrations._accelerate."""
