"""Tensors computed once: kept in memory or in files, found by content; image features of any transformers model."""
