"""`lineage.json`: every input has its hash, and the hash tells arrays apart."""

import numpy as np

from compress.conclude import pinned
from compress.converters.vela import VELA
from compress.data import Data
from compress.lineage import lineage, parents
from compress.splits import split

X = np.arange(60, dtype=np.float32).reshape(30, 2)


def test_every_input_has_its_hash_and_what_was_not_given_has_none() -> None:
    found = parents(Data(X, y=np.arange(30)), model="1" * 64, teacher=None, recipe="2" * 64)
    assert list(found) == ["model", "recipe", "data.x", "data.y"]
    assert all(len(digest) == 64 for digest in found.values())


def test_the_hash_of_an_array_knows_values_shape_and_type() -> None:
    arrays = (X, X + 1, X.reshape(60, 1), X.view(np.int32), X[::-1], X.T)
    assert len({parents(Data(x))["data.x"] for x in arrays}) == len(arrays)
    assert parents(Data(X)) == parents(Data(np.asfortranarray(X)))


def test_made_up_inputs_are_no_parents() -> None:
    assert parents(Data(X, synthetic=True)) == {}


def test_which_rows_went_where_is_written_down() -> None:
    splits = split(Data(X), 0)
    trace = lineage("1" * 64, {}, splits, 0, "x86-vnni")
    assert sum(trace.splits.values()) == len(X)
    assert trace.rows == splits.hashes()
    assert trace.rows != lineage("1" * 64, {}, split(Data(X), 1), 0, "x86-vnni").rows
    assert {"python", "numpy", "onnx", "skerry"} <= set(trace.tools)
    assert lineage("1" * 64, {}, None, 0, "x86-vnni").rows == {}


def test_what_training_computed_on_is_written_down_where_there_was_some() -> None:
    assert lineage("1" * 64, {}, None, 0, "x86-vnni", trained_on="cpu, float32").trained_on == "cpu, float32"
    assert lineage("1" * 64, {}, None, 0, "x86-vnni").trained_on == ""


def test_a_converter_in_an_environment_of_its_own_is_among_the_tools() -> None:
    versions = pinned(VELA)
    assert versions["ethos-u-vela"].count(".") == 2
    assert versions.items() <= lineage("1" * 64, {}, None, 0, "ethos-u55", versions).tools.items()
