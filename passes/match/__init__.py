"""Match: which regions of a trace are feed-forward networks, and why the others are not."""
