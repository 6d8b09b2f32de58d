"""The command ``moefy``; ``main`` has its verbs."""
