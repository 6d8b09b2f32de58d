"""A live model, as every stage needs it: dotted paths, quiet runs, comparing outputs, what forbids a change."""
