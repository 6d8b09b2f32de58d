"""Upcycling methods: how experts are made of a dense FFN."""
