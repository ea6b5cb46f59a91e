"""One host a file: each translates the host's life cycle, and needs its package installed."""
