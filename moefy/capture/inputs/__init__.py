"""Example inputs of a model: told by its config or its library, else guessed from its signature and first layers."""
