"""The CUDA side of the ops: from their arguments to the launchers of ``moefy.triton_ops``."""
