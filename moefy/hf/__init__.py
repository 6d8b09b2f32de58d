"""The Hugging Face edge: inputs from a config, models from a config file. Imported only on demand."""
