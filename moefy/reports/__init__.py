"""Reports: what was rewritten, how evenly the experts are used, the environment; and how they are drawn."""
