"""Outputs of frozen stages, computed once and kept: in memory or in files found by content."""
