"""Measures the overhead of lrprobe and of its alternatives; prints Markdown tables.

The unit is one ``AdamW(fused=True)`` step on the same tensors, timed in the same run. ``make
bench`` runs all tables; pass names of tables to run only those.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

import lrprobe
from lrprobe.engine.flight import StepInFlight

WIDTH, BLOCKS, WORDS = 768, 6, 16_000
ROUNDS = 11


def shapes() -> list[tuple[int, ...]]:
    """Parameter shapes of a GPT-like network: 54.8 million elements in 73 tensors."""
    w = WIDTH
    block = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,)]
    return [(WORDS, w)] + BLOCKS * [*block, (4 * w, w), (4 * w,), (w, 4 * w), (w,)]


def trained(
    sizes: Sequence[tuple[int, ...]], kind: str = "AdamW", **options: Any
) -> torch.optim.Optimizer:
    """An optimizer after several steps, with a gradient for every parameter."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(size, generator=generator)) for size in sizes]
    options = options or ({"fused": True} if kind == "AdamW" else {})
    optimizer = getattr(torch.optim, kind)(params, lr=1e-3, **options)
    for _ in range(4):
        for param in params:
            param.grad = 1e-3 * torch.randn(param.shape, generator=generator)
        optimizer.step()
    return optimizer


def seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def recorded(
    optimizer: torch.optim.Optimizer, rounds: int = ROUNDS, engine: str = "auto"
) -> list[tuple[float, float, float]]:
    """Per round, seconds of a bare step, and overhead of a recorded one, without and with flush."""
    found = []
    os.environ["LRPROBE_ENGINE"] = engine
    with attached(optimizer) as (probe, due):
        for _ in range(rounds):
            unit = seconds(optimizer.step)
            due.on = True
            start = time.perf_counter()
            optimizer.step()
            taken = time.perf_counter() - start
            due.on = False
            probe.flush()
            found.append((unit, taken - unit, time.perf_counter() - start - unit))
    del os.environ["LRPROBE_ENGINE"]
    return found


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n")
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")
    sys.stdout.flush()


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


class Switch:
    """A predicate for ``every=`` that can be turned on and off."""

    on = False

    def __call__(self, _: int) -> bool:
        """Whether to record this step."""
        return self.on


@contextmanager
def attached(optimizer: Any, **options: Any) -> Iterator[tuple[lrprobe.Probe, Switch]]:
    """A warmed-up probe, and the switch that turns recording on."""
    due = Switch()
    with lrprobe.attach(optimizer, every=due, **options) as probe:
        due.on = True
        for _ in range(2):
            optimizer.step()
        due.on = False
        probe.flush()
        yield probe, due


# --- Alternatives --------------------------------------------------------------------------------


def forum_loop(optimizer: torch.optim.Optimizer) -> None:
    """Mean, min, max and std of α/(√v̂+ε), each with ``.item()``."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            corrected = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
            rate = group["lr"] / (corrected.sqrt() + group["eps"])
            _ = rate.mean().item(), rate.min().item(), rate.max().item(), rate.std().item()


def norms(optimizer: torch.optim.Optimizer) -> None:
    """Norms of parameter, gradient and both moments, each with ``.item()``."""
    for param, state in optimizer.state.items():
        for each in (param, param.grad, state["exp_avg"], state["exp_avg_sq"]):
            torch.linalg.vector_norm(each).item()


def exact_quantiles(optimizer: torch.optim.Optimizer) -> None:
    """Five quantiles of the rate, by sorting."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            rate = group["lr"] / (state["exp_avg_sq"].sqrt() + group["eps"])
            ordered = rate.flatten().sort().values
            ordered[(torch.tensor([0.01, 0.05, 0.5, 0.95, 0.99]) * (len(ordered) - 1)).long()]


def wandb_watch(optimizer: torch.optim.Optimizer) -> list[float] | None:
    """Overhead of ``wandb.watch`` for all gradients, in units; None without the package."""
    try:
        import wandb
    except ImportError:
        return None
    params = [param for group in optimizer.param_groups for param in group["params"]]
    model = nn.Module()
    model.held = nn.ParameterList(params)
    factors = [param.grad.clone() for param in params]

    def backward() -> None:
        sum((p * f).sum() for p, f in zip(params, factors, strict=True)).backward()
        optimizer.zero_grad()

    plain = [seconds(backward) for _ in range(ROUNDS)]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["WANDB_SILENT"] = "true"
        run = wandb.init(mode="offline", dir=folder, project="bench")
        run.watch(model, log="gradients", log_freq=1)
        backward()
        watched = []
        for _ in range(ROUNDS):
            watched.append(seconds(backward))
            run.log({})
        run.unwatch(model)
        run.finish()
    for param, factor in zip(params, factors, strict=True):
        param.grad = factor
    unit = statistics.median(seconds(optimizer.step) for _ in range(ROUNDS))
    return [(each - statistics.median(plain)) / unit for each in watched]


# --- Tables --------------------------------------------------------------------------------------


def step() -> None:
    """Overhead of a recorded step, and of alternatives."""
    optimizer = trained(shapes())
    rows = []

    def ratios(extra: Callable[[], Any]) -> list[float]:
        found = []
        for _ in range(ROUNDS):
            unit = seconds(optimizer.step)
            found.append(seconds(extra) / unit)
        return found

    threads = torch.get_num_threads()
    for count in range(1, threads + 1):
        torch.set_num_threads(count)
        rounds = recorded(optimizer)
        inside = [extra / unit for unit, extra, _ in rounds]
        alike = [made / unit for unit, _, made in rounds]
        name = f"lrprobe, {count} thread{'s' * (count > 1)}"
        rows.append((name, spread(inside, 2), spread(alike, 2)))
    inside = [extra / unit for unit, extra, _ in recorded(optimizer, 5, "eager")]
    rows.append(("lrprobe, `LRPROBE_ENGINE=eager`", spread(inside), ""))
    others: list[tuple[str, Callable[[torch.optim.Optimizer], None]]] = [
        ("four norms per parameter, with `.item()`", norms),
        ("a common loop from forums: mean, min, max, std of the rate", forum_loop),
        ("exact quantiles by sorting", exact_quantiles),
    ]
    for name, function in others:
        with torch.no_grad():
            taken = ratios(lambda f=function: f(optimizer))
        rows.append((name, spread(taken), ""))
    watched = wandb_watch(optimizer)
    rows.append(
        ("`wandb.watch`, gradients", "not installed" if watched is None else spread(watched), "")
    )
    unit = statistics.median(seconds(optimizer.step) for _ in range(ROUNDS))
    head = ("what", "units, in the step", "including the record")
    table(f"Overhead of a recorded step (unit: {1e3 * unit:.0f} ms)", head, rows)


def growth() -> None:
    """Scaling with the number of tensors, and with the number of elements."""
    rows = []
    for count in (10, 100, 1000, 5000):
        optimizer = trained([(8,)] * count)
        idle = []
        for _ in range(ROUNDS):
            without = statistics.median(seconds(optimizer.step) for _ in range(100))
            with attached(optimizer):
                beside = statistics.median(seconds(optimizer.step) for _ in range(100))
            idle.append(1e6 * (beside - without))
        taken = [1e6 * whole / count for _, _, whole in recorded(optimizer)]
        rows.append((f"{count:,}", spread(idle), spread(taken)))
    head = (
        "tensors of 8 elements",
        "overhead of an unrecorded step, µs",
        "recorded step alone, with its record, µs per tensor",
    )
    table("Scaling with the number of tensors", head, rows)
    rows = []
    for millions in (2, 20, 200):
        rounds = recorded(trained([(1000, 1000)] * millions), 5)
        per_element = [1e9 * extra / (millions * 1e6) for _, extra, _ in rounds]
        units = [extra / unit for unit, extra, _ in rounds]
        rows.append((f"{millions} million", spread(per_element, 2), spread(units)))
    head = ("elements", "recorded step, ns per element", "units")
    table("Scaling with the number of elements", head, rows)


def kinds() -> None:
    """Other optimizers, in the same unit."""
    bare = trained(shapes())
    rows = []
    chosen: list[tuple[str, dict[str, Any]]] = [
        ("Adadelta", {"foreach": True}),
        ("SGD", {"momentum": 0.9}),
        ("RMSprop", {"foreach": True}),
        ("NAdam", {"foreach": True}),
        ("Adagrad", {"foreach": True}),
    ]
    for kind, options in chosen:
        optimizer = trained(shapes(), kind, **options)
        found = []
        for own, extra, _ in recorded(optimizer):
            found.append(extra / seconds(bare.step))
            del own
        rows.append((kind, spread(found, 2)))
    table("Overhead of a recorded step, other optimizers", ("what", "units, in the step"), rows)


def first() -> None:
    """The first recorded step, without and with generated code cached on disk."""
    program = (
        "import time, torch, lrprobe\n"
        "from torch import nn\n"
        "params = [nn.Parameter(torch.randn(64, 64)) for _ in range(4)]\n"
        "optimizer = torch.optim.AdamW(params)\n"
        "probe = lrprobe.attach(optimizer, every=1)\n"
        "for param in params: param.grad = torch.randn_like(param)\n"
        "start = time.perf_counter(); optimizer.step(); print(time.perf_counter() - start)\n"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("nothing cached", "cached on disk"):
            environment = {**os.environ, "XDG_CACHE_HOME": folder}
            command = [sys.executable, "-c", program]
            done = subprocess.run(  # noqa: S603 - our own program
                command, env=environment, check=True, capture_output=True, text=True
            )
            rows.append((name, f"{float(done.stdout):.2f}"))
    table("The first recorded step", ("what", "seconds"), rows)


def sizes() -> None:
    """Overhead per tensor, by size: of 30 steps in a row, because those of small nets wait."""
    rows = []
    steps = 30
    for side in (8, 64, 128, 256, 512):
        optimizer = trained([(side, side)] * 100)

        def run(optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(steps):
                optimizer.step()

        inside, whole = [], []
        with attached(optimizer) as (probe, due):
            for _ in range(ROUNDS):
                bare = seconds(run)
                due.on = True
                start = time.perf_counter()
                run()
                inside.append(1e4 * (time.perf_counter() - start - bare) / steps)
                due.on = False
                probe.flush()
                whole.append(1e4 * (time.perf_counter() - start - bare) / steps)
        rows.append((f"{side} × {side}", spread(inside, 0), spread(whole, 0)))
    table(
        "Size of a tensor",
        ("100 tensors of", "µs per tensor, in the step", "including the record"),
        rows,
    )


def sinks() -> None:
    """Time of each sink to write a record of 150 parameters."""
    records: list[Any] = []
    made: list[float] = []
    original = StepInFlight.record

    def record(self: StepInFlight) -> Any:
        start = time.thread_time()
        records.append(original(self))
        made.append(time.thread_time() - start)
        return records[-1]

    optimizer = trained([(100, 50), (50,)] * 75)
    StepInFlight.record = record  # type: ignore[method-assign]
    with attached(optimizer) as (_, due):
        due.on = True
        for _ in range(20):
            optimizer.step()
    StepInFlight.record = original  # type: ignore[method-assign]
    rows = [("creating the record", spread([1e3 * each for each in made[2:]], 2))]
    with tempfile.TemporaryDirectory() as folder:
        places = {
            "Memory": lrprobe.sinks.Memory(),
            "Parquet": lrprobe.sinks.Parquet(f"{folder}/run.parquet"),
            "TensorBoard": lrprobe.sinks.TensorBoard(f"{folder}/run"),
        }
        for name, sink in places.items():
            rows.append(
                (name, spread([1e3 * seconds(lambda r=r, s=sink: s.write(r)) for r in records], 2))
            )
            sink.close()
        name = "`SummaryWriter`: six scalars and a histogram per parameter"
        rows.append((name, by_hand(folder, optimizer)))
    table("Sinks, a record of 150 parameters", ("what", "ms"), rows)


def by_hand(folder: str, optimizer: torch.optim.Optimizer) -> str:
    """The equivalent with a ``SummaryWriter``, without lrprobe."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(f"{folder}/hand")
    rates = {f"p{i}": torch.rand(p.shape) for i, p in enumerate(optimizer.state)}

    def write(at: int) -> None:
        for name, rate in rates.items():
            for metric in ("p05", "p50", "p95", "update", "grad", "ratio"):
                writer.add_scalar(f"{metric}/{name}", 0.5, at)
            writer.add_histogram(f"rate/{name}", rate, at)

    found = [1e3 * seconds(lambda at=at: write(at)) for at in range(ROUNDS)]
    writer.close()
    return spread(found, 2)


class Attention(nn.Module):
    """Causal self-attention and a feed-forward layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.forth = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, length, width) to the same shape."""
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.forth(self.norms[1](x))


def training() -> None:
    """Throughput of a training loop: a small GPT on random tokens."""
    torch.manual_seed(0)
    width, words = 256, 2000
    model = nn.Sequential(
        nn.Embedding(words, width), *(Attention(width) for _ in range(4)), nn.Linear(width, words)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    data = torch.randint(words, (8, 129))

    def one() -> None:
        logits = model(data[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def many(steps: int) -> float:
        return seconds(lambda: [one() for _ in range(steps)]) / steps

    many(5)
    rows = []
    for every, steps in ((1, 10), (10, 20), (100, 100)):
        slower, taken = [], []
        for _ in range(5):
            bare = many(steps)
            with lrprobe.attach(optimizer, model, every=every) as probe:
                slower.append(100 * (many(steps) / bare - 1))
                taken.append(bare)
                probe.flush()
        rows.append((str(every), f"{1e3 * statistics.median(taken):.0f}", spread(slower)))
    elements = sum(p.numel() for p in model.parameters()) / 1e6
    head = ("`every`", "ms per step without lrprobe", "overhead in %")
    title = f"Training a small GPT ({elements:.1f} million elements, 1,024 tokens per step)"
    table(title, head, rows)


def main() -> None:
    """Run the tables named on the command line, or all."""
    warnings.filterwarnings("ignore", "lrprobe: another probe")
    tables = {each.__name__: each for each in (step, kinds, first, growth, sizes, sinks, training)}
    chosen = sys.argv[1:] or list(tables)
    if not set(chosen) <= set(tables):
        sys.exit(
            f"unknown tables {sorted(set(chosen) - set(tables))}; there are {', '.join(tables)}"
        )
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    today = datetime.now(tz=UTC).date()
    print(f"lrprobe {version('lrprobe')}, torch {torch.__version__}, {platform.python_version()}")
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} cores, {today}, load {load:.1f}")
    print(f"Medians of {ROUNDS} rounds, quartiles in brackets.")
    for name in chosen:
        tables[name]()


if __name__ == "__main__":
    main()
