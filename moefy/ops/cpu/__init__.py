"""The CPU side of the ops."""
