"""One file per host: each translates the host's life cycle, and needs its package installed."""
