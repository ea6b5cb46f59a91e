"""Every generated block program: in Triton's interpreter beside eager code, or compiled.

A program of its own, since Triton interprets for the whole of a process, or not at all:

    TRITON_INTERPRET=1 python tests/block_programs.py interpret PART PARTS
    TRITON_INTERPRET=1 python tests/block_programs.py large 0 1
    python tests/block_programs.py compile PART PARTS
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import versions
from optimizers import RULED, Case
from torch import Tensor

from lrprobe.engine import Engine, block_printer, blocks, cuda
from lrprobe.engine.buffers import Vectors, column
from lrprobe.engine.distribution import Bins, unfold
from lrprobe.engine.figures import CHECKS, FIGURES
from lrprobe.engine.generated import import_generated
from lrprobe.engine.pieces import WatchedParameter
from lrprobe.rules import find_rule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tables(
    case: Case, dtype: torch.dtype, engine: Engine, spoil: Callable[[list[Tensor]], None]
) -> Iterator[list[Vectors]]:
    """Figures of the second step of a case, in one way; then of the same step, eagerly."""
    generator = torch.Generator().manual_seed(3)
    params = [p for p in case.parameters(dtype) if p.numel()]
    optimizer = case.make(params)
    rule = find_rule(type(optimizer))

    def watched() -> list[WatchedParameter]:
        return [
            WatchedParameter(str(i), 0, weakref.ref(p), rule, None, p.numel())
            for i, p in enumerate(params)
        ]

    case.gradients(params, generator)
    optimizer.step()
    case.gradients(params, generator)
    for param in params:
        if not case.sparse:
            param.grad.view(-1)[::3] = 0
    spoil([p.grad for p in params])
    both = engine, Engine("eager")
    with torch.no_grad():
        sides = [(each, watched()) for each in both]
        kept = [each.before(side, optimizer) for each, side in sides]
    optimizer.step()
    with torch.no_grad():
        for (each, side), pre in zip(sides, kept, strict=True):
            figures = each.after(side, optimizer, pre)
            assert not figures.failed, figures.failed
            yield figures.vectors


def joined(each: list[Vectors]) -> tuple[np.ndarray, list[Bins]]:
    """Figures of all parameters, and how their rates are distributed."""
    count = sum(len(v.at) for v in each)
    table = np.full((count, len(FIGURES) + len(CHECKS)), np.nan)
    bins = [Bins.empty() for _ in range(count)]
    for vectors in each:
        found = unfold(vectors.folded.numpy()) if vectors.folded is not None else vectors.bins
        for row, i in enumerate(vectors.at):
            table[i] = vectors.table[row].numpy()
            if found is not None:
                mine = found.owner == row
                bins[i] = Bins(found.owner[mine], found.bins[mine], found.counts[mine])
    return table, bins


def compare(  # noqa: C901 - one tolerance after the other
    found: list[Vectors], right: list[Vectors], dtype: torch.dtype
) -> None:
    """To the tolerances of the contract."""
    (a, bins), (b, wanted) = joined(found), joined(right)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    with np.errstate(all="ignore"):
        of = lambda table, name: table[:, column(name)]  # noqa: E731 - a short name for it
        for figure in FIGURES:
            x, y = of(a, figure.name), of(b, figure.name)
            slack = tolerance * np.abs(y)
            if figure.name == "rate_log2":
                slack = 0.01 * of(b, "moving")
            elif figure.name == "rate_square":
                n, s, t = of(b, "moving"), of(b, "rate"), of(a, "rate")
                x, y = (np.sqrt(np.maximum(q / n - (r / n) ** 2, 0)) for q, r in ((x, t), (y, s)))
                slack = np.maximum(1e-5 if tolerance == 1e-5 else 1e-7, tolerance) * s / n
            elif figure.name == "update_grad":
                size = np.sqrt(of(b, "update_square"))
                slack = tolerance * size * (np.sqrt(of(b, "grad_square")) + size)
            elif figure.name == "below_eps":
                slack = 1 + 0 * y  # one that is as large as eps
            agree = (np.abs(x - y) <= slack) | (x == y) | (np.isnan(x) & np.isnan(y))
            if figure.name in ("rate_min", "rate_max"):  # either shows that there is a NaN
                agree |= np.isnan(y) & (np.isnan(of(a, "rate_min")) | np.isnan(of(a, "rate_max")))
            agree |= ~np.isfinite(y) & ~np.isfinite(x) & (figure.name == "rate_square")
            assert agree.all(), (figure.name, x, y)
        for figure in CHECKS:
            x, y = np.sqrt(np.abs(of(a, figure.name))), np.sqrt(np.abs(of(b, figure.name)))
            largest = np.fmax(y, np.sqrt(of(b, "intended")) if figure.name == "residual" else y)
            if figure.name.startswith("state"):
                largest = np.sqrt(of(b, figure.name.replace("residual", "change")))
            agree = (np.abs(x - y) <= 1e-6 * largest) | (x == y) | (np.isnan(x) & np.isnan(y))
            agree |= np.isnan(y) & (x == 0)
            assert agree.all(), (figure.name, x, y)
    for mine, theirs in zip(bins, wanted, strict=True):
        if {mine.counts.sum(), theirs.counts.sum()} == {0, 1}:
            continue  # whether the rate of a single element is shared, eager code cannot tell
        assert mine.counts.sum() == theirs.counts.sum(), (mine.counts, theirs.counts)
        far = np.repeat(mine.bins, mine.counts.astype(int)) - np.repeat(
            theirs.bins, theirs.counts.astype(int)
        )
        assert np.abs(far).max(initial=0) <= 1, far


def nothing(_: list[Tensor]) -> None:
    """Gradients as they are."""


def nonfinite(grads: list[Tensor]) -> None:
    """A NaN and an infinity."""
    grads[0].view(-1)[0], grads[0].view(-1)[1] = torch.nan, torch.inf


def huge(grads: list[Tensor]) -> None:
    """Products that float32 does not hold."""
    for grad in grads:
        grad.mul_(1e30)


def tiny(grads: list[Tensor]) -> None:
    """Products that are 0 in float32."""
    for grad in grads:
        grad.mul_(1e-25)


def cases() -> Iterator[tuple[Case, torch.dtype, Callable[[list[Tensor]], None]]]:
    """All in float32; one of each optimizer in other dtypes, and with extreme gradients."""
    seen = set()
    for case in RULED:
        yield case, torch.float32, nothing
        if case.cls not in seen and not case.sparse and case.cls is not versions.MUON:
            seen.add(case.cls)
            for dtype in DTYPES[1:]:
                yield case, dtype, nothing
            for spoil in (nonfinite, huge, tiny):
                yield case, torch.float32, spoil


def texts(part: int, parts: int) -> Iterator[tuple[Any, list[str]]]:
    """Cases of this part that have programs which none before them had, and these."""
    known: set[Any] = set()
    for case, dtype, spoil in cases():
        found = collected(case, dtype)
        new = [text for text in found if (text, spoil) not in known]
        known.update((text, spoil) for text in new)
        if new and zlib.crc32(new[0].encode()) % parts == part:
            yield (case, dtype, spoil), new


def collected(case: Case, dtype: torch.dtype) -> list[str]:
    """Texts of the programs of a case; nothing is run."""
    found = []
    source, launch = block_printer.source, cuda.launch

    def kept(recorded: Any, dtypes: Any) -> str:
        found.append(source(recorded, dtypes))
        counted = recorded.rate is not None and recorded.moves is not None
        whole = recorded.table is FIGURES
        about[found[-1]] = counted, whole, not whole or torch.float64 in dtypes, case.id
        return found[-1]

    cuda.source, cuda.launch = kept, lambda *_, **__: None
    cuda._modules.clear()
    engine = Engine("eager")
    engine.backends = {"cpu": cuda}
    try:
        next(tables(case, dtype, engine, nothing), None)
    finally:
        cuda.source, cuda.launch = source, launch
    return found


about: dict[str, tuple[bool, bool, bool, str]] = {}
"""Of a text: whether it counts rates, is of all elements, and in float64; its case."""


def compiled(part: int, parts: int) -> int:
    """Those of a part, for two generations of devices; none may spill more than ``SPILLED``."""
    import triton.language as tl

    cuda.DEVICES.add("cpu")
    every = {text for _, new in texts(0, 1) for text in new}
    count, wrong = 0, []
    for text in sorted(every):
        if zlib.crc32(text.encode()) % parts != part:
            continue
        module = import_generated(text, blocks.__file__)
        counted, whole, exact, _ = about[text]
        real = tl.float64 if exact else tl.float32
        versions: list[tuple[Any, dict[str, Any]]] = [(module.kernel, {"FULL": False})]
        if whole:
            versions.append((module.kernel, {"FULL": True}))
        if whole and (counted or not exact):
            versions.append((module.again, {}))
        for program, constants in versions:
            wide = tl.float64 if program is module.again else real
            lanes = cuda.lanes(constants.get("FULL", False), wide is tl.float64)
            constants.update(REAL=real, WIDE=wide, LANES=lanes)
            counts = "*i32" if counted else "*fp32"
            kinds = ("*i64", "*fp64", "*fp32", "*fp64", counts, counts)
            for generation in (80, 90):
                stack = stack_of(program, kinds, constants, generation)
                if stack > SPILLED:
                    options = program.__name__, generation, constants
                    wrong.append(f"{options}: {stack} bytes in {about[text][3]} {module.__file__}")
                count += 1
    for only_wide in (True, False):  # these are the same for all
        kinds = ("*i64", "*fp64", "*fp32", "*fp64", "*i32", "*fp64", "*fp64", "i32")
        constants = {"ONLY_WIDE": only_wide, "N": 64, "C": 32}
        assert stack_of(blocks.combine, kinds, constants, 80 + 10 * only_wide) <= SPILLED
    assert stack_of(blocks.copy, ("*i64", "*i16"), {"N": 1024}, 80) == 0
    assert not wrong, "\n".join(wrong)
    return count


SPILLED = 8
"""Bytes of stack that pass. ptxas 13.4, with the options that Triton gives it, puts a register of
some programs for sm_90 aside: the one looked into needs 80 of 255, and does not without them."""


def stack_of(program: Any, kinds: Sequence[str], constants: dict[str, Any], generation: int) -> int:
    """Bytes of stack that a thread of a compiled program needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = program.arg_names[: len(kinds)]
    signature = dict(zip(names, kinds, strict=True)) | dict.fromkeys(constants, "constexpr")
    pointers = [i for i, kind in enumerate(kinds) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    made = triton.compile(
        ASTSource(program, signature, constants, aligned),
        target=GPUTarget("cuda", generation, 32),
        options={"enable_fp_fusion": True},
    )
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", done.stdout)))


def hasten() -> None:
    """Have the interpreter patch the language once a launch, not at each call of a function."""
    from triton.runtime import interpreter

    patch, launch, patched = interpreter._patch_lang, cuda.launch, set()

    def once(function: Any) -> Any:
        key = id(function.__globals__)
        if key not in patched:
            patched.add(key)
            return patch(function)
        return None

    def anew(*args: Any, **kwargs: Any) -> None:
        patched.clear()
        launch(*args, **kwargs)

    interpreter._patch_lang, cuda.launch = once, anew


def interpret(part: int, parts: int) -> int:
    """Those of a part beside eager code."""
    hasten()
    engine, count, wrong = Engine("eager"), 0, []
    engine.backends = {"cpu": cuda}
    for (case, dtype, spoil), _ in texts(part, parts):
        try:
            compare(*tables(case, dtype, engine, spoil), dtype)
        except Exception as error:  # noqa: BLE001 - all are named in the end
            wrong.append(f"{case.id} {dtype} {spoil.__name__}: {type(error).__name__}: {error}")
        count += 1
    assert not wrong, "\n".join(wrong)
    return count


def large(part: int, _: int) -> int:
    """A tensor of several chunks, whole or not aligned, of which all or few elements move."""
    import triton.language as tl

    hasten()
    blocks.ALL = tl.constexpr(2048)
    engine = Engine("eager")
    engine.backends = {"cpu": cuda}
    for offset in (0, 1):
        for moving in (9000, 1500):
            memory = [torch.randn(9001)[offset : offset + 9000] for _ in range(2)]
            param, grad = torch.nn.Parameter(memory[0]), memory[1]
            grad[moving:] = 0
            grad[: moving // 3] *= 1e-4  # rates far apart: of a few rows the pivot is none
            optimizer = torch.optim.Adagrad([param], lr=0.1)
            sides = []
            for each in (engine, Engine("eager")):
                w = WatchedParameter("p", 0, weakref.ref(param), find_rule(torch.optim.Adagrad),
                                     None, 9000)  # fmt: skip
                sides.append((each, [w]))
            param.grad = grad
            with torch.no_grad():
                kept = [each.before(side, optimizer) for each, side in sides]
                optimizer.step()
                pairs = zip(sides, kept, strict=True)
                both = [each.after(side, optimizer, pre).vectors for (each, side), pre in pairs]
            if moving > blocks.ALL.value:  # one in so many was counted
                counts = unfold(both[0][0].folded.numpy()).counts
                assert (counts % blocks.STRIDE.value == 0).all()
                assert abs(counts.sum() / moving - 1) < 0.05, counts.sum()
                both[0][0].folded, both[0][0].bins = None, both[1][0].bins
            compare(*both, torch.float32)
    return 4


def main() -> None:
    """What the command line says."""
    what, part, parts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.manual_seed(0)
    np.seterr(all="ignore")
    run = {"interpret": interpret, "compile": compiled, "large": large}[what]
    print(f"{run(part, parts)} programs")


if __name__ == "__main__":
    main()
