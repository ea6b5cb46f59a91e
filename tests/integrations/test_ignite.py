"""Ignite: the frame of an engine's run is that of the same loop by hand."""

import time
from contextlib import nullcontext

import pytest
import torch
from hosts import BATCHES, assert_resumed, assert_same, by_hand, loader, net
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import lrprobe
from lrprobe import sinks
from lrprobe.integrations.ignite import attach


def engine(model, optimizer, **options):
    """A trainer of Ignite's own making."""
    loss = nn.functional.cross_entropy
    return create_supervised_trainer(model, optimizer, loss, **options)


@pytest.mark.parametrize(("kind", "lr"), [(AdamW, 1e-2), (SGD, 0.1)])
def test_a_run_has_the_frame_of_the_loop(kind, lr):
    """Every figure of every step, with a schedule."""
    model = net()
    optimizer = kind(model.parameters(), lr=lr)
    trainer = engine(model, optimizer)
    scheduler = CosineAnnealingLR(optimizer, 24)
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda _: scheduler.step())
    probe = attach(trainer, optimizer, model, every=1)
    trainer.run(loader(), max_epochs=2)
    probe.close()
    model = net()
    optimizer = kind(model.parameters(), lr=lr)
    step = CosineAnnealingLR(optimizer, 24).step
    assert_same(probe.frame(), by_hand(model, optimizer, epochs=2, after=step))


def test_accumulation_counts_steps_of_the_optimizer():
    """Or iterations of the engine, where that is asked for."""
    frames = []
    for iterations in (False, True):
        model = net()
        optimizer = AdamW(model.parameters())
        trainer = engine(model, optimizer, gradient_accumulation_steps=4)
        options = {"step": lambda t=trainer: t.state.iteration} if iterations else {}
        with attach(trainer, optimizer, model, every=1, batch_size=8, **options) as probe:
            trainer.run(loader())
        frames.append(probe.frame())
    model = net()
    hand = by_hand(model, AdamW(model.parameters()), accumulate=4, batch_size=8)
    assert_same(frames[0], hand)
    hand["step"] *= 4
    assert_same(frames[1], hand)


def test_all_is_written_when_the_run_ends():
    """However it ends, the probe stays for the next run of the engine, which goes on counting."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = engine(model, optimizer)
    written = []

    class Sink:
        flush_secs = 1000

        def write(self, record):
            pass

        def flush(self):
            written.append(True)

        def close(self):
            pass

    probe = attach(trainer, optimizer, model, to=Sink(), every=1)
    trainer.run(loader())
    assert len(written) == 1
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=15), trainer.terminate)
    trainer.run(loader(), max_epochs=2)
    assert len(written) == 2
    assert probe.step == 15
    probe.close()


def test_an_interrupted_run_is_written_and_goes_on(tmp_path):
    """What was recorded can be read while the engine stands still."""
    model = net()
    optimizer = AdamW(model.parameters())
    trainer = engine(model, optimizer)
    path = tmp_path / "a.parquet"
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), trainer.interrupt)
    with attach(trainer, optimizer, model, to=path, every=1):
        trainer.run(loader())
        assert lrprobe.read(path)["step"].max() == 5
        trainer.run(loader())
        assert lrprobe.read(path)["step"].max() == BATCHES


@pytest.mark.parametrize("handled", [False, True])
def test_an_exception_is_its_owners(tmp_path, handled):
    """It comes out of the run, or goes to the user's handler, and what was recorded is written."""
    model = net()
    optimizer = AdamW(model.parameters())
    trainer = engine(model, optimizer)
    sink = sinks.Parquet(tmp_path / "a.parquet", flush_secs=0.1)
    probe = attach(trainer, optimizer, model, to=sink, every=1)
    seen = []
    if handled:
        trainer.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: seen.append(error))
    trainer.add_event_handler(Events.ITERATION_COMPLETED(once=5), lambda _: 1 / 0)
    with nullcontext() if handled else pytest.raises(ZeroDivisionError):
        trainer.run(loader())
    assert len(seen) == handled
    until = time.monotonic() + 30
    while lrprobe.read(sink.destination)["step"].max() != 5:
        assert time.monotonic() < until
        time.sleep(0.05)
    probe.close()
    sink.close()


def test_a_checkpoint_has_the_counts(tmp_path):
    """The probe goes into Ignite's Checkpoint, and a resumed run counts on, under SGD too."""
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    trainer = engine(model, optimizer)
    probe = attach(trainer, optimizer, model, every=1)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer, "probe": probe}
    keep = Checkpoint(objects, DiskSaver(str(tmp_path), require_empty=False))
    trainer.add_event_handler(Events.EPOCH_COMPLETED, keep)
    trainer.run(loader(), max_epochs=2)
    probe.close()

    again = net()
    optimizer = SGD(again.parameters(), lr=0.1)
    trainer = engine(again, optimizer)
    probe = attach(trainer, optimizer, again, every=1)
    objects = {"model": again, "optimizer": optimizer, "trainer": trainer, "probe": probe}
    Checkpoint.load_objects(objects, checkpoint=torch.load(tmp_path / keep.last_checkpoint))
    trainer.run(loader(), max_epochs=4)
    probe.close()
    whole = net()
    hand = by_hand(whole, SGD(whole.parameters(), lr=0.1), epochs=4)
    later = hand[hand["step"] > 24].reset_index(drop=True)
    assert_resumed(probe.frame(), later, first=25)
