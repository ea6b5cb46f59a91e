"""Merges shards and replicas of the parameters over ``torch.distributed`` into one frame on rank 0.

At ``attach``, the ranks exchange the names and layouts of their parameters. From these, each rank
knows which pieces it contributes to which rows, so that no element is counted twice. A recorded
step then takes two all-reduces on lrprobe's own process group, a third for the distributions of
rates that differ by element, and one more if tensor parallelism leaves partial gradients. They are
issued in the optimizer's hook, and completed in a later one.
"""

from lrprobe.distributed.exchange import Exchange, finish
from lrprobe.distributed.ranks import join, world

__all__ = ["Exchange", "finish", "join", "world"]
