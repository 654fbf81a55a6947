"""integrations._transformers."""
