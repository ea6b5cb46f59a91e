"""Optimizers of other frameworks, presented to the hooks as torch optimizers.

The other framework is imported only by the module that supports it.
"""
