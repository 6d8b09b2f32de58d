"""The passes that write and fuse Mixture-of-Experts ops in a graph."""
