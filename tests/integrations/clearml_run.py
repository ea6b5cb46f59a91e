"""A run with an offline task of ClearML, in a process of its own: its threads outlive a test.

python clearml_run.py RESULT: what the task's session has goes to RESULT, as JSON.
"""

import json
import os
import sys
from pathlib import Path

from clearml import Task
from hosts import by_hand, net
from torch.optim import AdamW

from lrprobe import sinks

message = ""
try:
    sinks.ClearML()
except RuntimeError as error:
    message = str(error)
if "Task.init" not in message:
    sys.exit(f"without a task it says {message!r}")
Task.force_requirements_env_freeze(requirements_file=__file__)  # else it looks through them all
task = Task.init(
    "digits", "offline", auto_connect_frameworks=False, auto_connect_arg_parser=False,
    auto_resource_monitoring=False, auto_connect_streams=False,
)  # fmt: skip
to = [
    sinks.ClearML(prefix=f"{style}/", tag_style=style) for style in ("lrprobe", "composer", "olmo")
]
assert to[0].destination == f"clearml:{task.id}:lrprobe/"
model = net()
by_hand(model, AdamW(model.parameters()), to=to)
task.flush(wait_for_uploads=True)
lines = Path(task.get_offline_mode_folder(), "metrics.jsonl").read_text().splitlines()
Path(sys.argv[1]).write_text(json.dumps([event for line in lines for event in json.loads(line)]))
os._exit(0)  # its end would pack the session, and wait for what is not there
