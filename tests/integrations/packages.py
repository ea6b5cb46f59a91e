"""The table of other packages' optimizers: how to make each, and what its rule is good for.

An optimizer that gets a rule is one row of ``CASES`` or more; one of pytorch_optimizer that
cannot be made from parameters alone is one of ``MADE``.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

BOTH = (True, False)
EXACT = 1e-12
SHAPES = ((5, 7), (11,), (3, 2, 4, 2), ())
LARGE = ((64, 100), (8192,), (16, 256))
"""bitsandbytes and torchao keep the state of these in few bits."""


def package(name: str) -> Any:
    """A package, by its module; the test is skipped where it is missing."""
    if name == "timm.optim":
        return timm()
    found = pytest.importorskip(name, reason=f"{name} is not installed")
    if name == "torchao.optim":
        torch.compiler.set_stance("force_eager")  # it compiles its step for each shape
    return found


def timm() -> Any:
    """timm's optimizers, from their own files.

    The rest of timm, which ``import timm`` brings along, needs torchvision.
    """
    if "timm.optim" not in sys.modules:
        spec = importlib.util.find_spec("timm")
        if spec is None:
            pytest.skip("timm is not installed")
        (folder,) = spec.submodule_search_locations or ()
        for name, path in (("timm", Path(folder)), ("timm.optim", Path(folder) / "optim")):
            module = types.ModuleType(name)
            module.__path__ = [str(path)]
            sys.modules[name] = module
    found = types.SimpleNamespace()
    for name in ("Lion", "Lamb", "Lars", "Adan"):
        setattr(found, name, getattr(importlib.import_module(f"timm.optim.{name.lower()}"), name))
    return found


@dataclass(frozen=True)
class Case:
    """One configuration of one optimizer.

    Attributes:
        module: where its class is imported from.
        name: of the class.
        kwargs: its options.
        tolerance: largest error of the reconstruction.
        dtype: of the parameters; the packages with low-bit states compute in float32.
        shapes: of the parameters.
    """

    module: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)
    tolerance: float = EXACT
    dtype: torch.dtype = torch.float64
    shapes: tuple[tuple[int, ...], ...] = SHAPES

    @property
    def id(self) -> str:
        """What pytest calls it."""
        options = "-".join(f"{key}={value}" for key, value in self.kwargs.items())
        size = "-large" if self.shapes is LARGE else ""
        return f"{self.module.partition('.')[0]}-{self.name}-{options}{size}".replace(" ", "")

    def make(self, params: Any) -> Optimizer:
        """The optimizer, ready to train."""
        optimizer: Any = getattr(package(self.module), self.name)(params, **self.kwargs)
        if hasattr(optimizer, "train"):  # Schedule-Free
            optimizer.train()
        return optimizer


def _exact() -> Iterator[Case]:
    """Those that compute in the parameter's own precision."""
    for decay in (0.0, 0.1):
        yield from _schedule_free({"weight_decay": decay})
        yield from _adapted({"weight_decay": decay})
        yield from _averaged({"lr": 0.01, "weight_decay": decay})
        yield from _layerwise({"lr": 0.01, "weight_decay": decay})
        yield from _adafactor({"weight_decay": decay})
    yield Case("pytorch_optimizer", "Lamb", {"adam": True, "maximize": True})
    yield Case("pytorch_optimizer", "Adan", {"max_grad_norm": 1.0}, shapes=SHAPES[:3])


def _schedule_free(wd: dict[str, Any]) -> Iterator[Case]:
    for foreach, more in product(BOTH, ({}, {"warmup_steps": 4, "r": 1.0})):
        options = {**wd, "foreach": foreach, **more}
        yield Case("schedulefree", "AdamWScheduleFree", {"lr": 0.01, **options})
        yield Case("schedulefree", "SGDScheduleFree", {"lr": 0.1, **options})
    for silent in BOTH:
        # While lr is 0, y and z are equal but for rounding, and the first steps are tiny.
        options = {"lr": 0.01, "betas": (0.9, 0.99), "silent_sgd_phase": silent, **wd}
        yield Case("schedulefree", "RAdamScheduleFree", options, 1e-10)
        yield Case("pytorch_optimizer", "ScheduleFreeRAdam", options, 1e-10)
    bound = {"ams_bound": True, "decoupling_c": 3, "maximize": True}
    for more in ({}, bound):
        yield Case("pytorch_optimizer", "ScheduleFreeAdamW", {"lr": 0.01, **more, **wd})
    yield Case("pytorch_optimizer", "ScheduleFreeSGD", {"warmup_steps": 3, **wd})


def _adapted(wd: dict[str, Any]) -> Iterator[Case]:
    for decouple, corrected in product(BOTH, BOTH):
        options = {"decouple": decouple, "use_bias_correction": corrected, "d0": 1e-3, **wd}
        yield Case("prodigyopt", "Prodigy", options)
        yield Case("prodigyopt", "Prodigy", {"betas": (0.0, 0.99), "slice_p": 3, **options})
        yield Case("dadaptation", "DAdaptAdam", options)
        options = {"weight_decouple": decouple, "bias_correction": corrected, "d0": 1e-3, **wd}
        yield Case("pytorch_optimizer", "Prodigy", {"foreach": corrected, **options})
        yield Case("pytorch_optimizer", "DAdaptAdam", {"foreach": corrected, **options})


def _averaged(both: dict[str, Any]) -> Iterator[Case]:
    for decouple, foreach in product(BOTH, BOTH):
        options = {"weight_decouple": decouple, "foreach": foreach, **both}
        fixed = {"fixed_decay": foreach, **options}
        yield Case("pytorch_optimizer", "Lion", fixed)
        yield Case("pytorch_optimizer", "Adan", options)
        warmup = {"t_alpha_beta3": 7 if foreach else None}
        yield Case("pytorch_optimizer", "AdEMAMix", {**warmup, **fixed})
        yield Case("timm.optim", "Adan", {"no_prox": decouple, "foreach": foreach, **both})
    yield Case("lion_pytorch", "Lion", both)
    yield Case("timm.optim", "Lion", both)
    yield Case("timm.optim", "Lion", {"corrected_weight_decay": True, "maximize": True, **both})


def _layerwise(both: dict[str, Any]) -> Iterator[Case]:
    uncorrected = {"always_adapt": True, "bias_correction": False, "max_grad_norm": None}
    for decouple, foreach in product(BOTH, BOTH):
        options = {"weight_decouple": decouple, "fixed_decay": foreach, "foreach": foreach, **both}
        yield Case("pytorch_optimizer", "Lamb", options)
        options = {"decoupled_decay": decouple, "foreach": foreach, **both}
        yield Case("timm.optim", "Lamb", {"trust_clip": foreach, **options})
        more = {"corrected_weight_decay": True, **uncorrected}
        yield Case("timm.optim", "Lamb", {**more, **options})
    for (momentum, nesterov), clip in product(((0.0, False), (0.9, False), (0.9, True)), BOTH):
        options = {"momentum": momentum, "nesterov": nesterov, "trust_clip": clip}
        yield Case("timm.optim", "Lars", {**both, **options, "lr": 0.1})


def _adafactor(wd: dict[str, Any]) -> Iterator[Case]:
    given = {"lr": 0.02, "relative_step": False}
    for beta1, scale, more in product((None, 0.9), BOTH, ({}, {"warmup_init": True}, given)):
        options = {"beta1": beta1, "scale_parameter": scale, **wd, **more}
        yield Case("transformers", "Adafactor", options)


def _few_bits() -> Iterator[Case]:
    """Those that compute in float32, with small parameters in 32 bits, and large ones in few."""
    bnb = ("bitsandbytes.optim", torch.float32)
    for decay in (0.0, 0.1):
        wd = {"lr": 0.01, "weight_decay": decay}
        warmup = {"t_alpha": 7, "t_beta3": 7}
        plain = [*product(("Adam", "AdamW", "AdEMAMix", "LAMB", "Lion"), ({},))]
        plain += [("AdEMAMix", warmup), ("LARS", {"momentum": 0.9})]
        for name, more in plain:
            for shapes in (SHAPES[:3], LARGE):
                yield Case(bnb[0], name, {**wd, **more}, 1e-6, bnb[1], shapes)
        for name in ("Adam8bit", "AdamW8bit", "AdEMAMix8bit", "LAMB8bit"):
            yield Case(bnb[0], name, wd, 0.1, bnb[1], LARGE)
        yield Case(bnb[0], "LARS8bit", {**wd, "momentum": 0.9}, 0.02, bnb[1], LARGE)
        for name, tolerance in (("8bit", 1.0), ("Fp8", 1.0), ("4bit", 0.8)):
            for family in ("Adam", "AdamW"):
                shapes = ((64, 128), (8192,))
                where = ("torchao.optim", family + name)
                yield Case(*where, wd, tolerance, torch.float32, shapes)
                yield Case(*where, {**wd, "amsgrad": True}, 2e-5, torch.float32, SHAPES[:3])


CASES: list[Case] = [*_exact(), *_few_bits()]
"""All optimizers with a rule, in the configurations that it was proved for."""


def one_per_class() -> list[Case]:
    """The first case of each optimizer."""
    found: dict[tuple[str, str], Case] = {}
    for case in CASES:
        found.setdefault((case.module, case.name), case)
    return list(found.values())


# --- every class of pytorch_optimizer -----------------------------------------------------------


class Net(nn.Module):
    """Holds the parameters, for optimizers that ask for a model."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.params = nn.ParameterList(params)


def _split(params: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
    """Muon's groups: matrices, and the rest."""
    matrices = [p for p in params if p.dim() == 2]
    return [
        {"params": matrices, "use_muon": True},
        {"params": [p for p in params if p.dim() != 2], "use_muon": False},
    ]


def _alone() -> None:
    """A process group of one."""
    if not torch.distributed.is_initialized():
        file = Path(tempfile.mkdtemp()) / "group"
        torch.distributed.init_process_group("gloo", f"file://{file}", rank=0, world_size=1)


def _distributed(cls: Any, params: Any) -> Any:
    _alone()
    return cls(_split(params))


def _matrices(cls: Any, params: Any) -> Any:
    return cls([p for p in params if p.dim() == 2])


def _after_backward(cls: Any, params: Any) -> Any:
    """It makes its state for parameters that have gradients already."""
    for param in params:
        param.grad = torch.ones_like(param)
    return cls(params, num_data=10)


class _Constant:
    """A scheduler that stays where it is."""

    def step(self) -> float:
        """The radius."""
        return 0.1


WRAPPERS = (
    "Lookahead", "Magma", "OrthoGrad", "PCGrad", "SafeFP16Optimizer", "ScheduleFreeWrapper",
    "TRAC",
)  # fmt: skip
"""Those that hold an optimizer, which is what a probe attaches to: AdamW here."""

SHARP = ("FriendlySAM", "GSAM", "LookSAM", "SAM", "WSAM")
"""The same, which evaluate the loss beside the weights before they step: SGD here."""

Make = Callable[[Any, Any], Any]
_MUON: Make = lambda cls, params: cls(_split(params))  # noqa: E731 - a table of them
_MODEL: Make = lambda cls, params: cls(Net(params))  # noqa: E731
_SHARP: Make = lambda cls, params: cls(params, SGD, lr=0.1)  # noqa: E731
_WRAP: Make = lambda cls, params: cls(AdamW(params))  # noqa: E731
MADE: dict[str, Make] = {
    **dict.fromkeys(("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon"), _MUON),
    **dict.fromkeys(("FriendlySAM", "LookSAM", "SAM"), _SHARP),
    **dict.fromkeys(WRAPPERS, _WRAP),
    "AdamMini": _MODEL,
    "BSAM": _after_backward,
    "DeMo": lambda cls, params: _alone() or _matrices(cls, params),
    "DistributedMuon": _distributed,
    "GSAM": lambda cls, params: cls(params, SGD(params, lr=0.1), Net(params), _Constant()),
    "LoRARite": lambda cls, params: cls([params[0], nn.Parameter(torch.ones(9, 5))]),
    "Ranger21": lambda cls, params: cls(params, num_iterations=10),
    "SpectralSphere": _matrices,
    "WSAM": lambda cls, params, **more: cls(Net(params), params, SGD, lr=0.1, **more),
}
"""How to make what takes more than parameters."""

CLOSURES = ("AliG", "BSAM", "LBFGS", *SHARP)
"""Those that evaluate the loss themselves."""

SECOND_ORDER = ("AdaHessian", "SophiaH")
"""Those that differentiate the gradient."""

NO_STEP = ("AdaLOMO", "LOMO")
"""Those that step inside the backward pass, and have no ``step()``."""


def classes() -> dict[str, type[Optimizer]]:
    """Name to class, of all optimizers in pytorch_optimizer."""
    module = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")
    members = inspect.getmembers(module, inspect.isclass)
    found = {name: cls for name, cls in members if issubclass(cls, Optimizer)}
    return {**found, "SafeFP16Optimizer": module.SafeFP16Optimizer}
