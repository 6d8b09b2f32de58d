"""The Hugging Face edge: callbacks for its Trainer. Imported on demand, so that moefy runs without transformers."""
