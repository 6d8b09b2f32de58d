"""Capture: a model in, its traces and judged FFN matches out. Nothing of the model changes.

Inputs are found (``inputs``), one forward runs quietly under the tracer, and what only the live modules tell is judged.
"""
