"""Upcycling methods: how experts are made of a dense FFN. One file a method, and its line in ``METHODS``."""

from __future__ import annotations

from moefy.config import MoEConfig
from moefy.rewrite.methods.base import DenseWeight, Exactness, Method, Origin, Stacked
from moefy.rewrite.methods.copy import Copy
from moefy.rewrite.methods.noise import Noise

METHODS: dict[str, type[Method]] = {method.name: method for method in (Copy, Noise)}

__all__ = ["METHODS", "DenseWeight", "Exactness", "Method", "Origin", "Stacked", "method_of"]


def method_of(config: MoEConfig) -> Method:
    """The method that ``config`` asks for."""
    return METHODS["noise" if config.expert_noise > 0 else "copy"](config)
