"""What a routed row passes: stacked linears and their body, or modules of one's own."""
