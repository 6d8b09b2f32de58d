"""The ``torch.compile`` backend "moefy": its options, dense models at compile time, and what it asks of Dynamo."""
