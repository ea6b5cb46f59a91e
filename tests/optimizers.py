"""The table of cases: torch's own optimizer database, and what it leaves out.

Every property of lrprobe is tested over this table. A case makes an optimizer for given
parameters; a new optimizer is one row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import versions
from torch import Tensor, nn
from torch.optim import Optimizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

EXACT = 1e-12
FLOAT32 = 1e-5  # torch computes a scalar of the step in float32
MUON = 1e-2  # torch orthogonalises in bfloat16


@dataclass(frozen=True)
class Case:
    """One configuration of one optimizer.

    Attributes:
        id: what pytest calls it.
        cls: the optimizer.
        kwargs: its options; tensors among them are copied for each optimizer.
        shapes: of the parameters that it takes.
        tolerance: largest error of the reconstruction in float64.
        sparse: whether it takes sparse gradients only.
        measured: whether there is no rule, so that its rate is measured.
    """

    id: str
    cls: type[Optimizer]
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    tolerance: float = EXACT
    sparse: bool = False
    measured: bool = False

    def make(self, params: Sequence[Any]) -> Optimizer:
        """The optimizer, for parameters or parameter groups."""
        kwargs = {
            key: value.clone() if isinstance(value, Tensor) else value
            for key, value in self.kwargs.items()
        }
        return self.cls(params, **kwargs)

    def parameters(
        self, dtype: torch.dtype = torch.float64, generator: torch.Generator | None = None
    ) -> list[nn.Parameter]:
        """Fresh parameters of the case's shapes."""
        generator = generator or torch.Generator().manual_seed(1)
        params = [
            nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
            for shape in self.shapes
        ]
        if self.kwargs.get("differentiable"):
            return [p.clone() for p in params]  # type: ignore[misc]
        return params

    def gradients(
        self, params: Sequence[Tensor], generator: torch.Generator, scale: float = 1.0
    ) -> None:
        """Give each parameter a gradient (a sparse one where that is what the case takes)."""
        for param in params:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale
            grad = grad.to(param.dtype)
            if self.sparse:
                keep = torch.rand(param.shape[0], generator=generator) < 0.5
                grad[~keep] = 0
                grad = grad.to_sparse(1)
            param.grad = grad


LINES = ((3, 64), (64,), (4, 8, 2))
"""Of sizes that are read together."""
SHAPES = ((5, 7), (11,), (3, 2, 4), (), (0,), *LINES)
MATRICES = ((5, 7), (12, 4), (3, 64), (16, 8))
ROWS = ((9, 3), (12,), (6, 32), (64,))

_FLOAT32_FLAGS = ("capturable", "differentiable")


def _tolerance(cls: type[Optimizer], kwargs: dict[str, Any]) -> float:
    if cls is versions.MUON:
        return MUON
    tensors = [v for v in kwargs.values() if isinstance(v, Tensor)]
    tensors += [b for b in kwargs.get("betas", ()) if isinstance(b, Tensor)]
    if tensors or any(kwargs.get(flag) for flag in _FLOAT32_FLAGS):
        return FLOAT32
    return EXACT


def _case(cls: type[Optimizer], kwargs: dict[str, Any], note: str) -> Case:
    sparse = cls is torch.optim.SparseAdam
    shapes = MATRICES if cls is versions.MUON else ROWS if sparse else SHAPES
    if cls is torch.optim.Adafactor:
        shapes = ((5, 7), (11,), (3, 2, 4), (), *LINES, (1, 64), (6, 1), (1, 1))
    return Case(
        id=f"{cls.__name__}-{note}".replace(" ", "_").replace(",", ""),
        cls=cls,
        kwargs=kwargs,
        shapes=shapes,
        tolerance=_tolerance(cls, kwargs),
        sparse=sparse,
        measured=cls is torch.optim.LBFGS,
    )


_IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    "forloop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "differentiable": {"differentiable": True, "foreach": False},
}


def _database() -> Iterator[Case]:
    for info in optim_db:
        cls = info.optim_cls
        for given in info.optim_inputs_func(device="cpu"):
            note = str(given.desc)
            if not info.supported_impls:
                yield _case(cls, dict(given.kwargs), note)
                continue
            for name in ("forloop", *info.supported_impls):
                kwargs = {**given.kwargs, **_IMPLEMENTATIONS[name]}
                if name == "foreach" and isinstance(kwargs.get("lr"), Tensor):
                    continue  # torch refuses foreach with a tensor lr unless capturable
                yield _case(cls, kwargs, f"{note}-{name}")


def _more() -> Iterator[Case]:
    optim = torch.optim
    rows: list[tuple[type[Optimizer], dict[str, Any], str]] = [
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}, "maximize"),
        (optim.SGD, {"lr": 0.1, "weight_decay": 0.3, "nesterov": True, "momentum": 0.8}, "nest-wd"),
        *(
            (optim.SGD, {"lr": 0.1, "nesterov": True, "momentum": 0.8, **options}, f"nest-{name}")
            for name, options in _IMPLEMENTATIONS.items()
        ),
        (optim.Adam, {"amsgrad": True, "maximize": True}, "amsgrad-maximize"),
        (
            optim.Adam,
            {"lr": torch.tensor(1e-3), "betas": (torch.tensor(0.9), torch.tensor(0.999)),
             "foreach": False},
            "tensor-betas",
        ),
        (optim.AdamW, {"lr": torch.tensor(0.01), "fused": True}, "tensor-lr-fused"),
        (optim.AdamW, {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False}, "lr64"),
        (optim.NAdam, {"decoupled_weight_decay": True, "maximize": True}, "decoupled-maximize"),
        (optim.RAdam, {"betas": (0.9, 0.99), "decoupled_weight_decay": True}, "rectified-early"),
        (optim.Adadelta, {"lr": 0.5, "rho": 0.5, "eps": 1e-3, "weight_decay": 0.5}, "strong-decay"),
        (optim.Adagrad, {"initial_accumulator_value": 0.5, "eps": 0.1}, "initial-eps"),
        (optim.RMSprop, {"momentum": 0.9, "weight_decay": 0.1}, "momentum-wd"),
        (optim.RMSprop, {"centered": True, "momentum": 0.9, "eps": 0.01}, "centered-momentum"),
        (optim.ASGD, {"lambd": 0.1, "alpha": 0.5, "weight_decay": 0.1}, "lambd-wd"),
        (optim.Adafactor, {"lr": 1.0, "eps": (1e-3, 1e-2), "d": 1.0}, "clipped"),
        (optim.Adamax, {"weight_decay": 0.1, "maximize": True}, "wd-maximize"),
    ]  # fmt: skip
    if versions.ADAM_DECOUPLES:
        options = {"weight_decay": 0.1, "decoupled_weight_decay": True}
        rows.append((optim.Adam, options, "decoupled"))
    if versions.MUON is not None:
        rows.append((versions.MUON, {"nesterov": False}, "plain-momentum"))
        rows.append((versions.MUON, {"adjust_lr_fn": "match_rms_adamw"}, "match-rms"))
    for cls, kwargs, note in rows:
        yield _case(cls, kwargs, f"more-{note}")


CASES: list[Case] = [*_database(), *_more()]
"""All of it."""

RULED: list[Case] = [case for case in CASES if not case.measured]
"""Those that have a rule."""


def one_per_class() -> list[Case]:
    """The first case of each optimizer."""
    found: dict[type[Optimizer], Case] = {}
    for case in CASES:
        found.setdefault(case.cls, case)
    return list(found.values())


def closure_of(optimizer: Optimizer) -> Callable[[], Tensor] | None:
    """A closure for optimizers that need one: it leaves the gradients as they are."""
    if isinstance(optimizer, torch.optim.LBFGS):
        params = [p for g in optimizer.param_groups for p in g["params"]]
        return lambda: sum((p.detach().square().sum() for p in params), torch.zeros(()))
    return None
