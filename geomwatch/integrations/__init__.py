"""Adapters that plug a Monitor into training hosts; each imports its host only when asked for."""
