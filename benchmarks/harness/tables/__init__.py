"""The parts of the reports: each function takes stories and returns a table in Markdown."""
