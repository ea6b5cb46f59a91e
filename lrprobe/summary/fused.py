"""Rule and figures in one pass over memory, for ``attach(compile=True)``.

The rule is traced, once for each kind of parameter. What is 0-dim in it (bias corrections, say)
stays in float64 and is computed beforehand; the elementwise rest is compiled together with the
sums that the figures are made of. The equation is written once: in the rule.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lrprobe.rules.base import Entry, Readable, Rule, Slice, SparseRows
from lrprobe.text import warn

COLUMNS = 4096
"""Sums are taken along so many elements, which keeps them accurate."""

_MOST_ROWS = 1024
_FEWER_ROWS = 256
"""Rows in a call; the fewer where the compiler stores intermediate results of as many elements."""

FIGURES = (
    "rate_away",  # Σ(rate − pivot)
    "rate_m2",
    "rate_log",
    "dd",
    "ee",
    "uu",
    "ug",
    "pp",
    "gg",
    "zeros",
    "rms_grad",
    "rms_update",
    "below_eps",
    "unfit",
    "rate_min",
    "rate_max",
)
"""Rows of a kernel's first output: sums, and the extremes.

``unfit`` tells what is not finite: by the sum of the states, which it spoils; or its count, where
the kernel ``is_exact``.
"""

_OPTIONS: dict[str, Any] = {  # else the compiler reads the inputs once for each sum
    "realize_reads_threshold": 10_000,
    "realize_opcount_threshold": 10_000,
    "realize_acc_reads_threshold": 10_000,
}
_MOST_INLINED = 2_000
"""Operations of a rule, each counted once for every path to it: what the compiler inlines then.
Newton's method (Adadelta with coupled decay) has millions, and would take it hours."""

_MOST_KINDS = 8
"""Kernels compiled for one rule; more means that a hyperparameter changes from step to step."""

_kernels: dict[Any, Kernel | None] = {}
_told: set[str] = set()


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kind of parameter.

    Attributes:
        prelude: 0-dim inputs to the scalars that the body needs, float64, and the decay.
        run: (parameter, gradient, states, scalars, pivot, decay) to ``FIGURES`` of each row of
            COLUMNS elements, (figures, rows), and all rates; with positions as a last argument,
            where it was built for that, to the rates there.
        states, scalars: names of the state entries that it reads.
        most: elements that it is given at once, a multiple of COLUMNS.
    """

    prelude: Callable[..., Any]
    run: Callable[..., tuple[Tensor, Tensor]]
    states: tuple[str, ...]
    scalars: tuple[str, ...]
    most: int
    _known: dict[Any, Any] = field(default_factory=dict)

    def scalars_of(self, entry: Entry, lr: Any) -> tuple[list[Tensor], Tensor]:
        """The scalars of this step, given the group's rate, and its decay: 0-dim."""
        lr = (
            lr.detach().squeeze()
            if isinstance(lr, Tensor)
            else torch.tensor(lr, dtype=torch.float64)
        )
        numbers = [lr, *(torch.as_tensor(entry.state[name]).detach() for name in self.scalars)]
        device = entry.param.device
        key = None
        if all(each.device.type == "cpu" for each in numbers):  # many parameters have the same
            key = (device, *((each.dtype, each.double().numpy().tobytes()) for each in numbers))
        if key is None or key not in self._known:
            self._known.clear()
            crossing, decay = self.prelude(*numbers)
            scalars = [x.to(device, torch.float32, non_blocking=True) for x in crossing]
            self._known[key] = scalars, decay
        return cast("tuple[list[Tensor], Tensor]", self._known[key])


def is_exact(device: torch.device) -> bool:
    """Whether kernels there add up in float64, and count what is not finite.

    Since a device is not asked what came out, nothing can be computed again. What rules compute
    stays in float32. On the CPU it would cost half of the speed.
    """
    return device.type != "cpu"


def totals(rows: Tensor, owners: int, *, exact: bool) -> dict[str, Tensor]:
    """What ``FIGURES`` of rows, as many of each owner, add up to: name to (owners,), float64."""
    each = rows.double().view(len(FIGURES), owners, -1)
    sums, low, high = each[:-2].sum(2), each[-2].amin(1), each[-1].amax(1)
    found = dict(zip(FIGURES, (*sums.unbind(), low, high), strict=True))
    found["nonfinite" if exact else "states"] = found.pop("unfit")
    return found


def kernel_for(
    entry: Entry, group: Mapping[str, Any], rule: Rule, *, sampled: bool = False
) -> Kernel | None:
    """The kernel for a parameter; None where it is not worth one, or cannot have one.

    Args:
        entry: the parameter.
        group: its group.
        rule: its rule.
        sampled: for rows of samples of several parameters: the pivot is one of each row, (rows, 1),
            and all rates come out.
    """
    tensors = _tensors(entry)
    states = tuple(k for k, t in tensors.items() if t.shape == entry.param.shape)
    if (
        rule.whole is not None
        or not rule.fuse
        or isinstance(entry.grad, SparseRows)
        or entry.param.dtype == torch.float64
        or len(states) < len([t for t in tensors.values() if t.numel() > 1])
        or not all(t.is_contiguous() for t in (entry.param, entry.grad, *tensors.values()))
    ):
        return None
    scalars = tuple(k for k, v in entry.state.items() if k not in states and v is not None)
    fixed = {k: v for k, v in group.items() if k not in ("params", "lr", "param_names")}
    dtypes = tuple(t.dtype for t in (entry.param, entry.grad, *tensors.values()))
    settings = repr(sorted(fixed.items()))
    key = (rule, sampled, states, scalars, dtypes, entry.param.device, settings)
    if key not in _kernels:
        if sum(1 for other in _kernels if other[:2] == key[:2]) >= _MOST_KINDS:
            _tell(f"hyperparameters of rule {rule.name!r} change too often to compile it each time")
            return None
        _kernels[key] = _built(entry, group, rule, states, scalars, sampled=sampled)
    return _kernels[key]


def _tensors(entry: Entry) -> dict[str, Tensor]:
    return {k: v for k, v in entry.state.items() if isinstance(v, Tensor) and v.dim()}


def _built(
    entry: Entry,
    group: Mapping[str, Any],
    rule: Rule,
    states: tuple[str, ...],
    scalars: tuple[str, ...],
    *,
    sampled: bool,
) -> Kernel | None:
    try:
        prelude, body, present = _traced(entry, group, rule, states, scalars)
        if prelude is None:
            return None
        exact = is_exact(entry.param.device)
        plain = _kernel(body, present, maximize=bool(group.get("maximize")), exact=exact)
        inlines = _inlined(body) <= _MOST_INLINED
        most = COLUMNS * (_MOST_ROWS if inlines else _FEWER_ROWS)
        kernel = Kernel(prelude, plain, states, scalars, most)
        blank = torch.ones(COLUMNS * _FEWER_ROWS, device=entry.param.device)
        numbers, _ = kernel.scalars_of(entry, group["lr"])
        like = [blank.to(t.dtype, copy=True) for t in (entry.param, cast("Tensor", entry.grad))]
        pieces = [blank.to(entry.state[k].dtype, copy=True) for k in states]
        zero = blank.new_zeros((), dtype=torch.float64 if exact else torch.float32)
        inputs = [*like, pieces, numbers, zero.clone(), zero]
        if sampled:
            inputs[4] = zero.repeat(_FEWER_ROWS).unsqueeze(1)
        else:
            inputs.append(torch.arange(0, len(blank), 50, device=entry.param.device))
        # Traced once more, so that each kernel is code of its own for the compiler's caches.
        code = make_fx(plain, tracing_mode="symbolic")(*inputs).forward
        options = _OPTIONS if inlines else {}
        run = torch.compile(code, fullgraph=True, dynamic=True, options=options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler says to its own developers
            run(*inputs)  # compiled here: a machine without a compiler fails now
        kernel = replace(kernel, run=run)
    except Exception as error:  # noqa: BLE001 - the compiler may raise anything
        _tell(f"torch.compile failed ({type(error).__name__}); recording goes on without it")
        return None
    return kernel


def _traced(
    entry: Entry,
    group: Mapping[str, Any],
    rule: Rule,
    states: tuple[str, ...],
    scalars: tuple[str, ...],
) -> tuple[Any, Any, dict[str, Any]]:
    present: dict[str, Any] = {}

    class Traced(Slice):
        dtype = entry.param.dtype  # where what is read is float32 already

    def update(param: Tensor, grad: Tensor, lr: Tensor, elements: Any, numbers: Any) -> Any:
        state = {**dict(zip(states, elements, strict=True)), **dict(zip(scalars, numbers))}  # noqa: B905
        s = Traced([Entry(param, grad, state)], {**group, "lr": lr}, _itself)
        u = rule.update(s)
        present["eps"] = None if u.eps is None else u.eps[1]
        present["grad"] = u.grad
        outputs = {
            "rate": u.effective_lr,
            "direction": u.direction,
            "rms_grad": u.rms_grad,
            "rms_update": u.rms_update,
            "statistic": None if u.eps is None else u.eps[0],
        }
        present["names"] = [k for k, v in outputs.items() if v is not None]
        decay = torch.as_tensor(u.decay, dtype=torch.float64)
        return [decay, *(torch.as_tensor(v) for v in outputs.values() if v is not None)]

    sample = torch.ones(8, device=entry.param.device)
    lr = group["lr"]
    tensor = isinstance(lr, Tensor)
    rate = lr.detach().squeeze().clone() if tensor else torch.tensor(lr, dtype=torch.float64)
    numbers = [torch.as_tensor(entry.state[name]).detach().clone() for name in scalars]
    inputs = (sample, sample.clone(), rate, [sample.clone() for _ in states], numbers)
    graph = make_fx(update, tracing_mode="fake")(*inputs)
    if isinstance(present["eps"], Tensor) or present["grad"] is not None:
        return None, None, present
    outputs = next(n for n in graph.graph.nodes if n.op == "output").args[0]
    if _flat(outputs[1]):
        return None, None, present  # one rate for all elements: cheap enough as it is
    if any(_rounds(node) for node in graph.graph.nodes):
        _tell(f"rule {rule.name!r} rounds on the way, as a compiler would not; it stays eager")
        return None, None, present
    _multiply(graph.graph)
    return (*_split(graph, outputs), present)


def _multiply(graph: fx.Graph) -> None:
    """Instead of dividing elements by a scalar, which takes several times as long."""
    aten = torch.ops.aten
    for node in graph.find_nodes(op="call_function", target=aten.div.Tensor):
        divided, by = node.args
        if isinstance(by, fx.Node) and _flat(by) and not _flat(node):
            with graph.inserting_before(node):
                inverse = graph.call_function(aten.reciprocal.default, (by,))
            inverse.meta["val"] = by.meta["val"]
            node.target, node.args = aten.mul.Tensor, (divided, inverse)


def _inlined(graph: fx.GraphModule) -> int:
    """Operations when each is written out again wherever its result is used."""
    count: dict[fx.Node, int] = {}
    for node in graph.graph.nodes:
        count[node] = 1 + sum(count[used] for used in node.all_input_nodes)
    return max(count.values(), default=0)


def _itself(tensors: Sequence[Readable]) -> Tensor:
    return cast("Tensor", tensors[0])


def _rounds(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _flat(node: fx.Node) -> bool:
    return bool(node.meta["val"].dim() == 0)


def _split(graph: fx.GraphModule, outputs: Sequence[fx.Node]) -> tuple[Any, Any]:
    """What is 0-dim, and what is elementwise."""
    prelude, body = fx.Graph(), fx.Graph()
    before: dict[fx.Node, fx.Node] = {}
    inside: dict[fx.Node, fx.Node] = {}
    nodes = [n for n in graph.graph.nodes if n.op != "output"]
    for node in nodes:
        if node.op == "placeholder":
            to, names = (prelude, before) if _flat(node) else (body, inside)
            names[node] = to.placeholder(node.name)
    elementwise = [n for n in nodes if n.op != "placeholder" and not _flat(n)]
    crossing = dict.fromkeys(i for n in elementwise for i in n.all_input_nodes if _flat(i))
    for node in crossing:
        inside[node] = body.placeholder(node.name)
    for node in nodes:
        if node.op == "placeholder":
            continue
        if _flat(node):
            before[node] = prelude.node_copy(node, lambda n: before[n])
        else:
            inside[node] = body.node_copy(node, lambda n: inside[n])
    prelude.output(([before[n] for n in crossing], before[outputs[0]]))
    body.output([inside[n] for n in outputs[1:]])
    return fx.GraphModule(graph, prelude), fx.GraphModule(graph, body)


def _kernel(
    body: Callable[..., Any], present: Mapping[str, Any], *, maximize: bool, exact: bool
) -> Callable[..., Any]:
    names: list[str] = present["names"]
    eps = present["eps"]
    dtype = torch.float64 if exact else torch.float32

    def kernel(
        param: Tensor,
        grad: Tensor,
        states: list[Tensor],
        scalars: list[Tensor],
        pivot: Tensor,
        decay: Tensor,
        *at: Tensor,
    ) -> tuple[Tensor, Tensor]:
        p = param.view(-1, COLUMNS).float()
        g = grad.view(-1, COLUMNS).float()
        elements = [state.view(-1, COLUMNS).float() for state in states]
        found = dict(zip(names, body(p, g, *elements, *scalars), strict=True))
        rate = found["rate"]
        g = -g if maximize else g  # as rules see it, which the body did by itself
        below = None if eps is None else found["statistic"] <= eps
        if exact:
            log = rate.log()
            finite = torch.isfinite(p) & torch.isfinite(g)
            for each in elements:
                finite = finite & torch.isfinite(each)
            unfit = ~finite
        else:  # of bits ``sums.logs`` makes logarithms
            log = rate.view(torch.int32)
            unfit = sum(elements[1:], elements[0]) if elements else torch.zeros_like(p)
        p, g, wide, d = (x.to(dtype) for x in (p, g, rate, found["direction"]))
        e = wide * d
        u = e + decay * p
        deviation = wide - pivot
        sums = [
            deviation,
            deviation * deviation,
            log,
            d * d,
            e * e,
            u * u,
            u * g,
            p * p,
            g * g,
            g == 0,
            found.get("rms_grad"),
            found.get("rms_update"),
            below,
            unfit,
        ]
        extremes = rate.amin(1).to(dtype), rate.amax(1).to(dtype)
        absent = torch.full_like(extremes[0], torch.nan)
        added = (absent if x is None else x.to(dtype).sum(1) for x in sums)
        rates = rate.view(-1)
        return torch.stack([*added, *extremes]), rates[at[0]] if at else rates

    return kernel


def _tell(message: str) -> None:
    if message not in _told:
        _told.add(message)
        warn(f"compile=True: {message}")
