"""The tensors that the sink of TensorBoard writes for the tab LRPROBE."""

import json

import numpy as np
import pytest
from tensorboard.util.tensor_util import make_ndarray
from test_sinks import NAMES, load, make_record

from lrprobe.sinks.tensorboard import TensorBoard
from lrprobe.text import shorter


def tables(folder):
    """What the tab's tensors say of themselves, and their values, tag by tag."""
    loaded = load(folder)
    for tag in loaded.Tags()["tensors"]:
        plugin = loaded.SummaryMetadata(tag).plugin_data
        if plugin.plugin_name == "lrprobe_table":
            values = [make_ndarray(event.tensor_proto) for event in loaded.Tensors(tag)]
            yield json.loads(plugin.content), values


def runs(folder):
    """The descriptions of the run: their metadata, and their texts, tag by tag."""
    loaded = load(folder)
    for tag in loaded.Tags()["tensors"]:
        plugin = loaded.SummaryMetadata(tag).plugin_data
        if plugin.plugin_name == "lrprobe_run":
            texts = [make_ndarray(event.tensor_proto).item() for event in loaded.Tensors(tag)]
            yield json.loads(plugin.content), [json.loads(text) for text in texts]


def test_the_tab_gets_every_parameter_in_one_tensor(tmp_path, monkeypatch):
    """Where the scalars are by module too; what its rows are is told once, in its metadata."""
    monkeypatch.setattr("lrprobe.sinks.tags.MAX_NAMES", 2)
    records = [make_record(step) for step in (1, 2)]
    sink = TensorBoard(tmp_path)
    for record in records:
        sink.write(record)
    sink.close()
    ((about, values),) = tables(tmp_path)
    assert about["names"] == list(NAMES)
    assert (about["level"], about["optimizer"]) == ("parameter", "AdamW")
    assert (about["groups"], about["numel"]) == ([0, 1, 0], [10, 10, 10])
    for record, matrix in zip(records, values, strict=True):
        assert matrix.dtype == np.float32
        for column, row in zip(about["columns"], matrix, strict=True):
            assert row.tolist() == record.tables["parameter"][column].astype("f4").tolist()
    assert {"effective_lr_p50", "update_ratio", "lost_fraction", "lr"} <= set(about["columns"])


def test_the_tensor_of_the_tab_begins_anew_where_its_rows_change(tmp_path):
    """A parameter, a rule or an attempt more is another tag, with metadata of its own."""
    sink = TensorBoard(tmp_path)
    changed = make_record(4)
    changed.tables["parameter"]["rule"][0] = "measured"
    for record in (make_record(1), make_record(2, names=("a", "b")), make_record(3), changed):
        sink.write(record)
    sink.write(make_record(1, attempt=1))
    sink.close()
    found = list(tables(tmp_path))
    assert len(found) == 4
    assert [len(values) for _, values in found] == [2, 1, 1, 1]
    assert len({about["sink"] for about, _ in found}) == 2


@pytest.mark.parametrize(
    ("most", "rows"), [(3, ["0.weight", "0.bias", "2.weight"]), (2, ["0", "2"])]
)
def test_the_tensor_of_the_tab_is_bounded(tmp_path, monkeypatch, most, rows):
    """Above so many parameters its rows are modules; names are never long."""
    monkeypatch.setattr("lrprobe.sinks.tab.MAX_ROWS", most)
    sink = TensorBoard(tmp_path)
    sink.write(make_record(1))
    sink.close()
    ((about, (matrix,)),) = tables(tmp_path)
    assert about["names"] == rows
    assert matrix.shape == (len(about["columns"]), len(rows))
    assert len(shorter("y" * 10**6)) < 250 > len(shorter("y" * 10**6 + "z"))
    assert shorter("y" * 10**6) != shorter("y" * 10**6 + "z")


def test_the_run_is_described_again_where_that_has_changed(tmp_path):
    """Once for each optimizer, and anew in another attempt; not for another dict that is equal."""
    first, second = {"optimizers": {"G": {"groups": [{"eps": 1}]}}}, {"optimizers": {"G": {}}}
    sink = TensorBoard(tmp_path)
    for step, run in enumerate((first, dict(first), second, second)):
        sink.write(make_record(step, optimizer="G", run=run))
        sink.write(make_record(step, optimizer="D", run=first))
    sink.write(make_record(0, attempt=1, optimizer="G", run=second))
    sink.close()
    found = list(runs(tmp_path))
    assert [about["optimizer"] for about, _ in found] == ["G", "D", "G"]
    assert [texts for _, texts in found] == [[first, second], [first], [second]]
    assert found[0][0]["sink"] == found[1][0]["sink"] != found[2][0]["sink"]


def test_a_write_that_failed_loses_no_description(tmp_path, monkeypatch):
    """What was not written with one record is written with the next."""
    sink = TensorBoard(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(sink._target, "add", raising)
        with pytest.raises(OSError, match="full"):
            sink.write(make_record(1))
    sink.write(make_record(2))
    sink.close()
    assert len(list(tables(tmp_path))) == len(list(runs(tmp_path))) == 1


def raising(event):
    """A disk that is full."""
    raise OSError("the disk is full")
