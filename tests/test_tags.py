"""What scalars are called, and the sinks that are not a backend of their own."""

import errno
import json
import math
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_sinks import expected_frame, make_record
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LinearLR

import lrprobe
from lrprobe import sinks
from lrprobe.record import LEVELS, frame_columns
from lrprobe.sinks.merge import merge_rows
from lrprobe.sinks.tags import STYLES, Tags

NAMES = ("0.weight", "0.bias", "1.weight", "1.bias")

EXACT = {
    "lrprobe": {
        *(f"{metric}/{name}" for name in NAMES for metric in ("update_norm", "grad_norm")),
        *(f"update_ratio/{name}" for name in NAMES),
        "lr/group0",
        "lr/group1",
    },
    "composer": {
        *(f"l2_norm/{of}/{name}" for name in NAMES for of in ("update", "grad", "param")),
        *(f"l2_norm_ratio/update_param/{name}" for name in NAMES),
        *(f"cosine/update_grad/{name}" for name in NAMES),
        "l2_norm/grad/global",
        "lr-AdamW/group0",
        "lr-AdamW/group1",
    },
    "olmo": {
        *(f"optim/{of}/{name}.norm" for name in NAMES for of in ("step", "grad", "param")),
        *(f"update_ratio/{name}" for name in NAMES),
        "optim/total_grad_norm",
        "optim/learning_rate_group0",
        "optim/learning_rate_group1",
    },
}
RATES = {
    *(f"{m}/{n}" for n in NAMES for m in ("effective_lr", "effective_lr_p05", "effective_lr_p95")),
    "reconstruction_error/_max",
}


def train(style="lrprobe", *, decay=0.0, steps=4, clip=None):
    """The scalars of AdamW's last step in two groups, and what torch says of that step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)).double()
    groups = [
        {"params": model[0].parameters()},
        {"params": model[1].parameters(), "lr": 0.1, "betas": (0.7, 0.9)},
    ]
    optimizer = AdamW(groups, lr=0.01, weight_decay=decay)
    scheduler = LinearLR(optimizer, 0.5, total_iters=10)
    found = {}
    sink = sinks.Scalars(lambda values, step: found.__setitem__(step, values), tag_style=style)
    with lrprobe.attach(optimizer, model, to=sink, every=1):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 6, dtype=torch.double)).square().sum().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            lrs = [group["lr"] for group in optimizer.param_groups]
            optimizer.step()
            scheduler.step()
    return found[steps], model, before, lrs, optimizer


def close(found, wanted):
    """To the rounding of float64."""
    assert found == pytest.approx(wanted, rel=1e-9)


# --- The strings, and the numbers behind them ---------------------------------------------------


@pytest.mark.parametrize("style", list(STYLES))
def test_the_tags_are_exactly_those_of_the_system(style):
    """Where the system has a name for a figure it is that, else lrprobe's own."""
    values, *_ = train(style)
    assert set(values) == EXACT[style] | RATES


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("style", list(STYLES))
def test_the_update_is_the_one_that_was_taken(style, decay):
    """With weight decay of the right sign, and each group's own lr and betas."""
    values, model, before, *_ = train(style, decay=decay)
    template = STYLES[style].figures["update_norm"]
    for name, p in model.named_parameters():
        taken = (p.detach() - before[name]).norm().item()
        close(values[template.format(name=name)], taken)


def test_without_decay_it_is_the_formula_that_both_systems_have():
    """‖lr/(1-β₁ᵗ)·m / (√(v/(1-β₂ᵗ))+ε)‖ from the optimizer's state."""
    composer, model, _, lrs, optimizer = train("composer")
    olmo, *_ = train("olmo")
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        for p in group["params"]:
            (name,) = [name for name, each in model.named_parameters() if each is p]
            state, (beta1, beta2) = optimizer.state[p], group["betas"]
            t = state["step"].item()
            root = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + group["eps"]
            step = (lr / (1 - beta1**t) * state["exp_avg"] / root).norm().item()
            close(composer[f"l2_norm/update/{name}"], step)
            close(olmo[f"optim/step/{name}.norm"], step)


def test_the_other_numbers_are_torchs():
    """Gradients as the optimizer used them, so clipped; parameters after the step."""
    values, model, before, *_ = train("composer", clip=0.5)
    olmo, *_ = train("olmo", clip=0.5)
    for name, p in model.named_parameters():
        update, grad = p.detach() - before[name], p.grad
        close(values[f"l2_norm/grad/{name}"], grad.norm().item())
        close(values[f"l2_norm/param/{name}"], p.detach().norm().item())
        ratio = update.norm() / p.detach().norm()
        close(values[f"l2_norm_ratio/update_param/{name}"], ratio.item())
        cosine = -(update * grad).sum() / update.norm() / grad.norm()
        close(values[f"cosine/update_grad/{name}"], cosine.item())
        close(olmo[f"optim/grad/{name}.norm"], grad.norm().item())
        close(olmo[f"optim/param/{name}.norm"], p.detach().norm().item())
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert whole == pytest.approx(0.5, rel=1e-4)
    close(values["l2_norm/grad/global"], whole)
    close(olmo["optim/total_grad_norm"], values["l2_norm/grad/global"])


def test_lr_is_the_one_of_the_step():
    """Not the next one, which the scheduler has set since."""
    values, _, _, lrs, optimizer = train("composer")
    assert [values["lr-AdamW/group0"], values["lr-AdamW/group1"]] == lrs
    assert lrs != [group["lr"] for group in optimizer.param_groups]
    values, *_ = train("olmo")
    assert [values[f"optim/learning_rate_group{i}"] for i in (0, 1)] == lrs


@pytest.mark.parametrize("names", [("Adam", "SGD"), ("a b", "a_b")])
@pytest.mark.parametrize("style", list(STYLES))
def test_two_optimizers_share_no_tag(style, names):
    """Whatever the style, no value overwrites another's, though their names are spelt the same."""
    run = {"optimizers": {name: {} for name in names}}
    tags, taken = Tags("", style), set()
    for optimizer in run["optimizers"]:
        values = tags.values(make_record(1, optimizer=optimizer, run=run))
        assert values
        assert not taken & set(values)
        taken |= set(values)


@pytest.mark.parametrize("style", ["composer", "olmo"])
def test_many_parameters_are_merged_to_modules(style, monkeypatch):
    """Then norms and the cosine are those of the module's tensors laid end to end."""
    monkeypatch.setattr("lrprobe.sinks.tags.MAX_NAMES", 2)
    values, model, before, *_ = train(style, decay=0.1)
    figures = STYLES[style].figures
    for name, layer in (("0", model[0]), ("1", model[1])):
        after = torch.cat([p.detach().flatten() for p in layer.parameters()])
        grad = torch.cat([p.grad.flatten() for p in layer.parameters()])
        start = torch.cat([before[f"{name}.{p}"].flatten() for p, _ in layer.named_parameters()])
        update = after - start
        wanted = {
            "update_norm": update.norm(),
            "grad_norm": grad.norm(),
            "param_norm": after.norm(),
            "update_ratio": update.norm() / after.norm(),
            "update_grad_cosine": -(update @ grad) / update.norm() / grad.norm(),
        }
        for key in wanted.keys() & figures.keys():
            close(values[figures[key].format(name=name)], wanted[key].item())


def test_a_parameter_that_did_not_move_has_no_part_in_the_angle():
    """Nor does it make the module's NaN."""
    record = make_record(1, names=("m.a", "m.b"))
    table = record.tables["parameter"]
    for name, values in {
        "update_norm": (3.0, 0.0), "grad_norm": (1.0, 1.0),
        "update_grad_cosine": (0.5, math.nan), "param_norm": (1.0, 1.0),
    }.items():  # fmt: skip
        table[name][:] = values
    merged = merge_rows(record, [0, 1])
    assert merged.figures["update_grad_cosine"] == pytest.approx(0.5 / math.sqrt(2))


@pytest.mark.parametrize("style", ["composer", "olmo"])
def test_tensorboard_has_the_style_and_reads_back(tmp_path, style):
    """Its scalars have the tags, its charts show them, and ``read`` finds the same figures."""
    for folder, tag_style in ((tmp_path / "a", style), (tmp_path / "b", "lrprobe")):
        sink = sinks.TensorBoard(folder, tag_style=tag_style)
        for step in (1, 2):
            sink.write(make_record(step, run={"optimizers": {"AdamW": {}}}))
        sink.close()
    loaded = EventAccumulator(str(tmp_path / "a")).Reload()
    wanted = Tags("", style).values(make_record(2))
    found = {tag: loaded.Scalars(tag)[-1].value for tag in loaded.Tags()["scalars"]}
    logs = {tag: found.pop(tag) for tag in list(found) if tag.startswith("effective_lr_log10_")}
    for tag, value in logs.items():
        assert 10**value == pytest.approx(wanted[tag.replace("_log10", "").replace("_p50", "")])
    assert len(logs) == 3 * 3
    assert found == {tag: np.float32(value) for tag, value in wanted.items()}
    pd.testing.assert_frame_equal(lrprobe.read(tmp_path / "a"), lrprobe.read(tmp_path / "b"))
    (card,) = loaded.Tensors("lrprobe/text_summary")[0].tensor_proto.string_val
    update = STYLES[style].figures["update_norm"].format(name="...")
    assert f"| `{update}` |" in card.decode()


@pytest.mark.parametrize("make", [lambda **k: sinks.Scalars(print, **k), sinks.TensorBoard])
def test_a_style_or_prefix_that_there_is_not_is_refused(make, tmp_path, monkeypatch):
    """The message has what came and what is allowed."""
    monkeypatch.chdir(tmp_path)
    where = {} if make is not sinks.TensorBoard else {"writer_or_dir": "run"}
    with pytest.raises(ValueError, match=r"tag_style='wandb'.*'lrprobe', 'composer', 'olmo'"):
        make(tag_style="wandb", **where)
    with pytest.raises(ValueError, match="prefix='a b'"):
        make(prefix="a b", **where)


# --- JSON Lines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("by", LEVELS)
def test_json_lines_are_the_frame(tmp_path, by):
    """pandas reads back the frame, to the last bit; what is not finite is null, and so NaN."""
    path = tmp_path / "new" / "run.jsonl"
    records = [make_record(step) for step in range(3)] + [make_record(3, stepped=False)]
    for record, odd in zip(records, (math.inf, -math.inf, math.nan), strict=False):
        record.tables[by]["effective_lr_max"][0] = odd
    records[0].tables["parameter"]["parameter"][0] = 'a "b" \\ ü'
    sink = sinks.JSONL(path, by=by)
    for record in records:
        sink.write(record)
    sink.close()
    wanted = expected_frame(records, by).replace([math.inf, -math.inf], math.nan)
    found = pd.read_json(path, lines=True, precise_float=True).astype(frame_columns(by))
    pd.testing.assert_frame_equal(found, wanted, check_exact=True)
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_json_lines_go_on_where_a_killed_process_stopped(tmp_path):
    """Half a line is removed, whole ones stay, and the attempt is one more."""
    path = tmp_path / "run.jsonl"
    for attempt in range(2):
        sink = sinks.JSONL(path)
        assert sink.attempt == attempt
        sink.write(make_record(attempt, attempt=attempt))
        sink.close()
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 5])
    torn = len(whole[: len(whole) // 5].splitlines()[-1])
    sink = sinks.JSONL(path)
    assert sink.attempt == 2
    assert path.stat().st_size == len(whole) + len(whole) // 5 - torn
    sink.close()


@pytest.mark.parametrize(
    "content",
    ["a,b\n1,2\n", "no end of line", '{"step":1}', '{"a": 1}\n', '{"attempt": 1}\n', "[1]\n"],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    """And left as it was."""
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"other\.jsonl.*not written by lrprobe"):
        sinks.JSONL(path)
    assert path.read_text() == content
    with pytest.raises(ValueError, match="by='layer'"):
        sinks.JSONL(path, by="layer")


def test_a_file_with_other_rows_is_refused(tmp_path):
    """Rows of modules do not go on after rows of parameters."""
    path = tmp_path / "run.jsonl"
    sink = sinks.JSONL(path)
    sink.write(make_record(1))
    sink.close()
    with pytest.raises(ValueError, match="by='module'"):
        sinks.JSONL(path, by="module")


def test_a_full_disk_leaves_no_half_a_record(tmp_path):
    """What could not be written whole is taken out again, so that it can be offered again."""
    sink = sinks.JSONL(tmp_path / "run.jsonl")
    sink.write(make_record(0))
    real = sink._file

    class Full:
        def write(self, data):
            if len(data) < 500:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real.write(data[: len(data) // 2])

        def truncate(self, size):
            return real.truncate(size)

        def fileno(self):
            return real.fileno()

    sink._file = Full()
    with pytest.raises(OSError, match="No space"):
        sink.write(make_record(1))
    sink._file = real
    sink.write(make_record(1))
    sink.close()
    found = pd.read_json(tmp_path / "run.jsonl", lines=True)
    assert list(found["step"]) == [0] * 3 + [1] * 3


def test_a_json_lines_file_that_is_removed_is_made_anew(tmp_path):
    """It is told once; nothing that comes later is written where nobody finds it."""
    path = tmp_path / "folder" / "run.jsonl"
    sink = sinks.JSONL(path)
    sink.write(make_record(0))
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError, match=r"run\.jsonl' was removed"):
        sink.write(make_record(1))
    for step in (1, 2):
        sink.write(make_record(step))
    sink.close()
    assert list(pd.read_json(path, lines=True)["step"].unique()) == [1, 2]
    assert sink.attempt == 0


def test_json_lines_go_on_where_they_began(tmp_path, monkeypatch):
    """A process that goes to another folder writes on in the same file."""
    monkeypatch.chdir(tmp_path)
    sink = sinks.JSONL("run.jsonl")
    sink.write(make_record(0))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    sink.write(make_record(1))
    sink.close()
    assert list(pd.read_json(tmp_path / "run.jsonl", lines=True)["step"].unique()) == [0, 1]


def test_a_path_to_json_lines_says_which_sink_it_is(tmp_path):
    """``to=`` takes no such path, and says what to pass."""
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"sinks\.JSONL\('run\.jsonl'\)"):
        lrprobe.attach(SGD(model.parameters(), lr=0.1), model, to="run.jsonl")


# --- A function, and several sinks at once --------------------------------------------------------


def test_a_function_gets_each_record():
    """In order, in another thread than the training's; what cannot be called is refused."""
    seen, threads = [], set()

    def fn(record):
        seen.append(record.step)
        threads.add(threading.get_ident())

    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    sink = sinks.Function(fn)
    with lrprobe.attach(optimizer, model, to=sink, every=1):
        for _ in range(5):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert seen == [1, 2, 3, 4, 5]
    assert threading.get_ident() not in threads
    assert repr(sink).endswith("fn)")
    assert isinstance(sink, sinks.Sink)
    with pytest.raises(TypeError, match="got 3"):
        sinks.Function(3)


def test_a_list_of_sinks_gets_everything_everywhere(tmp_path):
    """Files, logdir, a function, JSON Lines: the same rows and figures in each."""
    steps, scalars = [], {}
    lines = sinks.JSONL(tmp_path / "run.jsonl")
    to = [
        str(tmp_path / "run.parquet"),
        str(tmp_path / "run"),
        lines,
        sinks.Function(lambda record: steps.append(record.step)),
        sinks.Scalars(lambda values, step: scalars.__setitem__(step, values)),
    ]
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = Adam(model.parameters())
    with lrprobe.attach(optimizer, model, to=to, every=2) as probe:
        for _ in range(6):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
    lines.close()
    frame = probe.frame()
    pd.testing.assert_frame_equal(lrprobe.read(tmp_path / "run.parquet"), frame)
    found = pd.read_json(tmp_path / "run.jsonl", lines=True, precise_float=True)
    pd.testing.assert_frame_equal(found.astype(frame.dtypes), frame, check_exact=True)
    assert steps == sorted(scalars) == [1, 2, 4, 6]
    weight = frame[frame["parameter"] == "weight"].set_index("step")["update_norm"]
    assert {s: v["update_norm/weight"] for s, v in scalars.items()} == weight.to_dict()
    board = lrprobe.read(tmp_path / "run")
    board = board[board["parameter"] == "weight"]
    assert list(board["update_norm"]) == list(weight.astype("float32"))
