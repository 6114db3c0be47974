"""Stacks of layers: padding left out, and the last layer at the rows that are read."""
