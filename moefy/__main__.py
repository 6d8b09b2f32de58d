"""``python -m moefy`` is the command ``moefy``."""

from moefy.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
