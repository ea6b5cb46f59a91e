"""What the ranks of the DeepSpeed tests do, run by torchrun.

python -m torch.distributed.run --nproc-per-node 2 deepspeed_ranks.py FOLDER CASE...

A case is written stage-optimizer-option-...: ``2-adamw-clip-groups``; before it may stand what is
looked at: ``counted:2-adamw``.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed_net import BATCH, STEPS, data, frames, groups_of, learner, make, net
from torch import nn

import lrprobe


def started() -> Any:
    """DeepSpeed with its process group, and without an extension that it would have compiled."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    # It asks for a CPU that is quick in fp16; the others can do it, too.
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def config(stage: int, options: set[str]) -> dict[str, Any]:
    """As a user writes it."""
    zero: dict[str, Any] = {"stage": stage}
    if "offload" in options:
        zero["offload_optimizer"] = {"device": "cpu"}
    if "small" in options:  # several sub-groups
        zero |= {"sub_group_size": 500, "stage3_param_persistence_threshold": 100}
    if "robin" in options:
        zero["round_robin_gradients"] = True
    accumulate = 2 if "accumulate" in options else 1
    ranks = torch.distributed.get_world_size()
    result = {
        "train_micro_batch_size_per_gpu": BATCH // ranks // accumulate,
        "gradient_accumulation_steps": accumulate,
        "gradient_clipping": 0.05 if "clip" in options else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if "bf16" in options:
        result["bf16"] = {"enabled": True}
    if "fp16" in options:
        result["fp16"] = {
            "enabled": True,
            "initial_scale_power": 25 if "overflow" in options else 18,
            "hysteresis": 1,
            "loss_scale_window": 3,
        }
    return result


def engine_of(case: str) -> tuple[Any, nn.Module, set[str]]:
    """A new engine."""
    import deepspeed

    stage, kind, *rest = case.split("-")
    options = set(rest)
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make(kind, groups_of(model, options)),
        config=config(int(stage), options),
    )
    return engine, model, options


def passes(engine: Any, step: int, options: set[str], dtype: torch.dtype) -> Any:
    """The parts of a batch that are this rank's, one for each backward pass."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    x, y = (t.chunk(ranks)[rank].to(dtype) for t in data(step))
    count = 2 if "accumulate" in options else 1
    return zip(x.chunk(count), y.chunk(count), strict=True)


def dtype_of(options: set[str]) -> torch.dtype:
    """That of the model's parameters."""
    if "bf16" in options:
        return torch.bfloat16
    return torch.float16 if "fp16" in options else torch.float32


def train(
    engine: Any,
    options: set[str],
    steps: int = STEPS,
    before: Callable[[], object] = lambda: None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Steps of a training."""
    for step in range(steps):
        for x, y in passes(engine, step, options, dtype_of(options)):
            loss = (engine(x).float() - y.float()).square().mean()
            engine.backward(loss)
            boundary = engine.is_gradient_accumulation_boundary()
            if boundary:
                before()
            engine.step()
            if boundary:
                after()


def plain(case: str) -> Any:
    """The frames of the engine's training."""
    engine, model, options = engine_of(case)
    count = 2 if "accumulate" in options else 1
    batch = BATCH // torch.distributed.get_world_size() // count
    given: Any = engine if "engine" in options else learner(engine, options)
    os.environ["LRPROBE_ENGINE"] = "auto" if "generated" in options else "eager"
    with lrprobe.attach(given, model, every=2, track=3, batch_size=batch) as probe:
        train(engine, options)
        return frames(probe) if torch.distributed.get_rank() == 0 else None


def beside(case: str) -> Any:
    """Frames of a training in 16 bits, and of a twin in one process that gets its gradients.

    The twin has the weights in fp32, and the gradients that DeepSpeed's own functions tell of.
    """
    engine, model, options = engine_of(case)
    at = {"step": 0}
    twin = net().to(dtype_of(options)).float()
    optimizer = make(case.split("-")[1], groups_of(twin, options))
    if case.startswith("0"):  # DeepSpeed takes a step without gradients, to make the state
        for param in twin.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
        at["step"] = 1
    rank = torch.distributed.get_rank()
    own = [
        torch.distributed.new_group([each]) for each in range(torch.distributed.get_world_size())
    ]
    norms: dict[int, dict[str, float]] = {}
    kept = {"every": 1, "track": 3}
    count = 2 if "accumulate" in options else 1
    batch = BATCH // torch.distributed.get_world_size() // count
    probe = lrprobe.attach(engine, model, batch_size=batch, **kept)
    single = lrprobe.attach(
        optimizer, twin, step=lambda: at["step"], process_group=own[rank], **kept
    )

    def read() -> None:
        from deepspeed.utils import safe_get_full_grad

        for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
            mine.grad = safe_get_full_grad(theirs).float().reshape(mine.shape)

    def follow() -> None:
        at["step"] += 1
        # DeepSpeed raises the scale before it takes it out of the gradients.
        scale = getattr(engine.optimizer, "loss_scale", None) or 1.0
        if all(bool(p.grad.isfinite().all()) for p in twin.parameters()):
            for param in twin.parameters():
                param.grad /= scale
            if "clip" in options:
                nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
            optimizer.step()
        else:
            norms[at["step"]] = {name: float(p.norm()) for name, p in twin.named_parameters()}

    train(engine, options, 2 * STEPS, read, follow)
    probe.close()
    single.close()
    return (frames(probe), frames(single), norms) if rank == 0 else None


def counted(case: str) -> Any:
    """Collectives of lrprobe's own in each step, and in ``close()``: their bytes."""
    dist = torch.distributed
    engine, model, options = engine_of(case)
    probe = lrprobe.attach(engine, model, every=2, track=3)
    calls: list[int] = []
    steps: list[list[int]] = []
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if sys._getframe(1).f_globals["__name__"].startswith("lrprobe"):
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                calls.append(sum(t.numel() * t.element_size() for t in tensors))
            return originals[name](*args, **kwargs)

        return call

    def ended() -> None:
        steps.append(list(calls))
        calls.clear()

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    train(engine, options, after=ended)
    probe.close()
    for name, original in originals.items():
        setattr(dist, name, original)
    return {"steps": steps, "close": list(calls)}


COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast",
    "broadcast_object_list", "reduce", "reduce_scatter_tensor", "barrier", "send", "recv",
)  # fmt: skip


def untouched(case: str) -> bool:
    """Whether the master weights are the same bits with and without a probe."""
    results = []
    for probed in (False, True):
        engine, model, options = engine_of(case)
        if probed:
            lrprobe.attach(engine, model, every=1, track=2, batch_size=4)
        train(engine, options, 2 * STEPS)
        from deepspeed.utils import safe_get_full_fp32_param

        # Between the parameters there is padding, which is not initialised under stage 3.
        results.append([safe_get_full_fp32_param(param).clone() for param in model.parameters()])
    return len(results[0]) > 0 and all(map(torch.equal, *results))


def unknown(case: str) -> Any:
    """What is recorded, and said, where it is not known whose the master weights are."""
    engine, model, options = engine_of(case)
    wrapper = engine.optimizer
    if "subclass" in options:
        wrapper.__class__ = type("OwnOptimizer", (type(wrapper),), {})
    if "nvme" in options:
        wrapper.swap_optimizer = True
    if "shuffled" in options:
        wrapper.bit16_groups_flat.reverse()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        probe = lrprobe.attach(engine, model, every=1)
    if "nvme" in options:
        wrapper.swap_optimizer = False
    if "shuffled" in options:
        wrapper.bit16_groups_flat.reverse()
    train(engine, options)
    said = [str(each.message) for each in caught if str(each.message).startswith("lrprobe")]
    flats = getattr(wrapper, "fp32_partitioned_groups_flat", None)
    flats = wrapper.single_partition_of_fp32_groups if flats is None else flats
    norms = [float(flat.detach().double().norm()) for flat in flats]
    frame = probe.frame() if torch.distributed.get_rank() == 0 else None
    probe.close()
    return frame, said, norms


OTHERS = {"counted": counted, "untouched": untouched, "unknown": unknown}


def main(folder: Path, names: list[str]) -> None:
    started()
    for name in names:
        try:
            how, _, case = name.partition(":")
            small = dtype_of(set(name.split("-"))) is not torch.float32
            run = OTHERS.get(how, beside if small else plain)
            result: Any = run(case or name)
        except Exception:  # noqa: BLE001 - the test tells
            result = traceback.format_exc(limit=-6)
        rank = torch.distributed.get_rank()
        (folder / f"{name}.{rank}.pkl").write_bytes(pickle.dumps(result))
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", message="lrprobe:")
    main(Path(sys.argv[1]), sys.argv[2:])
