"""Trace: what one forward of a model does, as an ``fx.Graph`` at the level of torch functions."""
