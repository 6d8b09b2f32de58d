"""Trace: what one forward of a model does, as an ``fx.Graph`` at the level of torch functions."""

from moefy.passes.trace.recorder import Trace, fake_inputs, trace_graph, trace_module

__all__ = ["Trace", "fake_inputs", "trace_graph", "trace_module"]
