"""What differs between the supported versions of torch and pandas."""

from typing import Any

import pandas as pd
import torch
from torch.utils import backend_registration

MUON: Any = getattr(torch.optim, "Muon", None)
"""The class; None before torch 2.9."""

ADAM_DECOUPLES = issubclass(torch.optim.AdamW, torch.optim.Adam)
"""Whether Adam takes ``decoupled_weight_decay``: from torch 2.7 on."""

FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")
"""Whether ``fully_shard`` runs without a GPU: not in torch 2.6."""

FAR_DEVICE = hasattr(backend_registration, "_DummyBackendModule")
"""Whether a device can be registered that does not exist: not in torch 2.6."""

SEQUENCE_SGD = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
"""Whether SGD under sequence parallel steps as its equation says: 2.13 does, 2.9 does not."""

TEXT = str(pd.Series(dtype="str").dtype)
"""The dtype of a column of text: ``str``, before pandas 3 ``object``."""
