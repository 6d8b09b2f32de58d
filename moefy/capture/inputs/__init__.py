"""Example inputs: where a model says what it takes, and where it has to be guessed."""
