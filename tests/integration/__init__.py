"""How a transformed model works together with the rest of PyTorch and with transformers, and what bad input gets."""
