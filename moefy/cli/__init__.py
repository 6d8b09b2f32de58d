"""The command ``moefy``. ``main`` has its subcommands, a file beside it what each one does."""
