"""``moefy bench layer``: the layer beside other implementations, checked and timed in one run."""
