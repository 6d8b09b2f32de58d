"""Text on a terminal: tables, folded rows, progress bars."""
