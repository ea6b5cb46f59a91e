"""Run by Python at the start of each process that a watched one starts: it is watched too."""

import os

if os.environ.get("LRPROBE_PEERS"):
    from peers_watch import Watch

    Watch(attaches=os.environ["LRPROBE_PEERS"] == "probe").install()
