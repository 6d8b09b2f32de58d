"""Capture: a model in, its traces and judged FFN matches out. Nothing of the model changes.

Its steps, a file or a folder each:

    inputs      what the caller gave, else candidates derived from the model
    runs        quiet forwards under the tracer, on fake tensors where they do
    judge       what only the live modules tell: hooks, overridden forwards, tied weights
"""

from moefy.capture.captured import Captured, capture, capture_traced
from moefy.capture.runs import Part, accepted_inputs

__all__ = ["Captured", "Part", "accepted_inputs", "capture", "capture_traced"]
