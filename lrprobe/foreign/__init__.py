"""Optimizers that are not torch's, shown to the hooks as one of torch's: the figures are the same.

Nothing here imports another framework before it is asked for.
"""
