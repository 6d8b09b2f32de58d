"""What kernels share: launching, replayed launches, tile sizes, the schedule of tiles, activations."""
