"""Model families with what moefy must find in each, written from reading the model code."""
