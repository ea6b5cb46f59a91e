"""Tensors to mergeable figures, and figures to columns."""
