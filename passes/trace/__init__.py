"""Trace: what one forward of a model does, as an ``fx.Graph`` at the level of torch functions.

forward, graph_tracer    the two sources: a module's forward, or a graph that the caller has
recorder, module_calls   what watches them; fake: without memory or arithmetic
trace                    the result; vocabulary: what its nodes are called
"""

from moefy.passes.trace.fake import fake_inputs
from moefy.passes.trace.forward import trace_module
from moefy.passes.trace.graph_tracer import trace_graph
from moefy.passes.trace.module_calls import ROOT_CALL, ModuleCall
from moefy.passes.trace.trace import Trace

__all__ = ["ROOT_CALL", "ModuleCall", "Trace", "fake_inputs", "trace_graph", "trace_module"]
