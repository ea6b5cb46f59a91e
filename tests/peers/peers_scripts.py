"""Runs training scripts of other packages twice, bare and with a probe on every optimizer.

    python tests/peers/peers_scripts.py [PART OF A PATH ...]

The scripts are the longest that train with an optimizer of torch's, in what requirements.txt lists.
They find random images instead of MNIST and CIFAR-10, since nothing is downloaded. Prints a table.
"""

from __future__ import annotations

import json
import random
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from peers_run import BUILD, Suite, environment, sorted_warnings, table, unpacked

LIMIT = 600
"""Seconds for one run of a script."""


class Script(NamedTuple):
    """A training script.

    Attributes:
        package: whose sdist has it.
        path: in the sdist.
        arguments: of its command line; DATA is a folder of names, OUT an empty one.
    """

    package: str
    path: str
    arguments: str


SCRIPTS = [
    Script("accelerate", "src/accelerate/test_utils/scripts/test_script.py", ""),
    Script("opacus", "examples/cifar10.py",
           "--device cpu -j 0 --epochs 1 -b 64 --data-root OUT --log-dir OUT "
           "--checkpoint-file OUT/checkpoint"),
    Script("opacus", "examples/char-lstm-classification.py",
           "--device cpu --data-root DATA --epochs 3 -b 64"),
    Script("pytorch-ignite", "examples/gan/dcgan.py",
           "--dataset fake --dataroot OUT --workers 0 --no-cuda --epochs 2 --batch-size 32 "
           "--g-filters 8 --d-filters 8 --seed 1 --output-dir OUT"),
    Script("accelerate", "src/accelerate/test_utils/scripts/test_sync.py", ""),
    Script("pytorch-ignite", "examples/transformers/main.py", "run --backend=None"),
    Script("pytorch-ignite", "examples/cifar10/main.py",
           "run --data_path OUT --output_path OUT --num_epochs 2 --num_warmup_epochs 1 "
           "--batch_size 64 --num_workers 0 --model resnet18"),
    Script("opacus", "examples/dcgan.py",
           "--device cpu --data-root OUT --workers 0 --epochs 1 --ngf 8 --ndf 8 --manualSeed 1 "
           "--outf OUT"),
    Script("pytorch_optimizer", "examples/benchmark.py", ""),
    Script("pytorch-ignite", "examples/mnist/mnist_save_resume_engine.py",
           "--epochs 2 --log_dir OUT"),
    Script("opacus", "examples/vision_benchmark.py", "--device cpu -j 0 -b 4 --steps 3"),
    Script("pytorch-ignite", "examples/siamese_network/siamese_network.py",
           "--no-cuda --epochs 1 --batch-size 32 --dry-run"),
    Script("pytorch-warmup", "examples/cifar10/main.py",
           "--no-gpu --workers 0 --epochs 1 --dataroot OUT"),
    Script("opacus", "examples/mnist.py", "--device cpu --data-root OUT -n 2 -b 64"),
    Script("pytorch-warmup", "examples/emnist/main.py", "--no-gpu --workers 0 --epochs 1"),
    Script("pytorch-ignite", "examples/mnist/mnist_with_tensorboard_logger.py",
           "--epochs 1 --log_dir OUT"),
    Script("torch-optimizer", "examples/mnist.py", "--no-cuda --epochs 1"),
    Script("schedulefree", "examples/mnist/main.py", "--no-cuda --epochs 1"),
]  # fmt: skip


def child(found: Path, probe: bool, script: str, arguments: list[str]) -> None:
    """Run one script in this process, and write what was noted."""
    from peers_watch import Watch, declare_operators, seed_all

    declare_operators()
    _fake_torchvision()
    watch = Watch(attaches=probe)
    watch.install()
    seed_all(0)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    why = ""
    start = time.process_time()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as error:
        why = "" if not error.code else f"exits with {error.code}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is reported
        traceback.print_exc()
        why = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - start - watch.own_seconds
    about = watch.end()
    about["seconds"] = seconds + about.pop("closing")
    found.write_text(json.dumps({**about, "why": why}))


def _fake_torchvision() -> None:
    """Random images under the names of data sets."""
    import torch

    try:
        from torchvision import datasets
        from torchvision.transforms.functional import to_pil_image
    except ImportError:
        return

    class Images(torch.utils.data.Dataset[Any]):
        """What MNIST and its like have, as random numbers."""

        shape: tuple[int, ...] = (28, 28)

        def __init__(self, root: Any = None, *_: Any, **options: Any) -> None:
            generator = torch.Generator().manual_seed(1)
            pixels = torch.randint(256, (512, *self.shape), generator=generator)
            self.data: Any = pixels.to(torch.uint8)
            self.targets: Any = torch.randint(10, (512,), generator=generator)
            if len(self.shape) == 3:
                self.data, self.targets = self.data.numpy(), self.targets.tolist()
            self.transform = options.get("transform")
            self.target_transform = options.get("target_transform")

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, at: int) -> tuple[Any, int]:
            image = to_pil_image(self.data[at])
            return self.transform(image) if self.transform else image, int(self.targets[at])

    class Coloured(Images):
        shape = (32, 32, 3)

    for name in ("MNIST", "FashionMNIST", "EMNIST", "KMNIST"):
        setattr(datasets, name, Images)
    datasets.CIFAR10 = datasets.CIFAR100 = Coloured


def _names(folder: Path) -> None:
    """Names in five languages that nobody speaks, for the script that tells languages apart."""
    draw = random.Random(1)  # noqa: S311 - no secret
    for language in "ABCDE":
        names = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 9))) for _ in range(150)]
        (folder / f"{language}.txt").write_text("\n".join(names) + "\n")


def run(script: Script, source: Path, *, probe: bool) -> dict[str, Any]:
    """What one run of a script says of itself."""
    with tempfile.TemporaryDirectory() as folder:
        out, data = Path(folder, "out"), Path(folder, "data")
        out.mkdir()
        data.mkdir()
        _names(data)
        found = Path(folder, "found.json")
        given = script.arguments.replace("OUT", str(out)).replace("DATA", str(data)).split()
        command = [sys.executable, __file__, "--child", str(found), str(int(probe))]
        path = source / script.path
        log = BUILD / f"{script.package}-{path.stem}.{'probe' if probe else 'bare'}.log"
        try:
            with log.open("w") as output:
                subprocess.run(
                    [*command, str(path), *given],
                    cwd=out, env=environment(MPLBACKEND="Agg"), stdout=output, stderr=output,
                    timeout=LIMIT, check=False,
                )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"why": f"not ended after {LIMIT} s", "steps": []}
        if not found.exists():
            return {"why": "the process died", "steps": []}
        result: dict[str, Any] = json.loads(found.read_text().replace(folder, "FOLDER"))
        return result


def compared(script: Script) -> dict[str, Any]:
    """A line of the table."""
    source = unpacked(Suite(script.package, ()))
    lines = len((source / script.path).read_text().splitlines())
    bare = run(script, source, probe=False)
    about = {"script": f"{script.package}: {script.path}", "lines": lines}
    if bare["why"] and not bare["steps"]:
        return {**about, "steps": 0, "did not run": bare["why"]}
    probed = run(script, source, probe=True)
    same = "yes" if _same(bare, probed) else "NO"
    if same == "NO" and not _same(bare, run(script, source, probe=False)):
        same = "unstable without a probe too"
    return {
        **about,
        "steps": len(bare["steps"]),
        "rows": probed.get("rows", 0),
        "same bits": same,
        "errors": probed.get("errors", []),
        **sorted_warnings(probed.get("warnings", [])),
        "measured": probed.get("measured", {}),
        "leftovers": probed.get("leftovers", []),
        "time": probed.get("seconds", 0.0) / bare["seconds"],
        "ended by": bare["why"],
    }


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("steps", "why"))


def main() -> None:
    """Run the scripts that are named, else all."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3] == "1", sys.argv[4], sys.argv[5:])
        return
    BUILD.mkdir(parents=True, exist_ok=True)
    ran, others = [], []
    for script in SCRIPTS:
        if not sys.argv[1:] or any(part in script.path for part in sys.argv[1:]):
            result = compared(script)
            (ran if result["steps"] else others).append(result)
            print(json.dumps(result), flush=True)
    text = "\n\n".join(table(some) for some in (ran, others) if some)
    (BUILD / "scripts.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
