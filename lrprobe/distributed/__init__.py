"""Shards and replicas of the parameters, over ``torch.distributed``: one frame, on rank 0.

At ``attach`` the ranks tell each other the names of their parameters and how these are laid out
over the ranks. From that each knows which pieces of which rows it adds, so that nothing is counted
twice. A recorded step is then two collectives on a process group of our own, a third for the
distributions of rates that differ by element, and one more where tensor parallelism leaves partial
gradients: issued in the optimizer's hook, and picked up at a later one.
"""

from lrprobe.distributed.exchange import Exchange, finish
from lrprobe.distributed.ranks import join, world

__all__ = ["Exchange", "finish", "join", "world"]
