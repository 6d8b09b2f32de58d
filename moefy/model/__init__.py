"""A live model, as several stages need it: its names, quiet runs, comparing outputs, what forbids a change."""
