"""controllers.learning_rate_cap."""
