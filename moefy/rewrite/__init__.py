"""Rewrite: matches in, a Mixture-of-Experts out; and the way back.

New modules are built beside the old ones, installed, checked against the dense outputs, and only then sealed.
"""
