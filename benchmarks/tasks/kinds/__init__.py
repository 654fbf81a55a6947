"""Tasks of one file each: what the first ten are not."""
