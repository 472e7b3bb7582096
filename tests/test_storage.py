"""Entries come back exactly, whole or not at all."""

import os
from pathlib import Path

import numpy as np
import pytest

from toolkit.storage import Storage, default_storage

ARRAYS = {
    "floats": np.array([0.1, -0.0, np.nan, np.inf, 5e-324, np.nextafter(1.0, 2.0)]),
    "integers": np.arange(6).reshape(2, 3),
    "flags": np.array([True, False]),
    "text": np.array(["a", "ß"]),
    "empty": np.empty((0, 3)),
    "scalar": np.array(2.5),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "cache")


def entry(storage: Storage) -> Path:
    (path,) = storage.folder.rglob("*.entry")
    return path


def test_arrays_and_description_come_back_bit_for_bit(storage: Storage) -> None:
    meta = {"seconds": 0.1, "nothing": None, "names": ["a", "b"], "nested": {"n": 3}}
    storage.save("chain", "k1", ARRAYS, meta)
    arrays, loaded = storage.load("chain", "k1")  # type: ignore[misc]
    assert loaded == meta
    assert list(arrays) == list(ARRAYS)
    for name, values in ARRAYS.items():
        assert arrays[name].dtype == values.dtype
        assert arrays[name].shape == values.shape
        assert arrays[name].tobytes() == values.tobytes()


def test_kind_and_key_tell_entries_apart(storage: Storage) -> None:
    storage.save("chain", "k", {"x": np.array(1)}, {})
    storage.save("reference", "k", {"x": np.array(2)}, {})
    assert storage.load("chain", "other") is None
    assert storage.load("fit", "k") is None
    assert [int(storage.load(kind, "k")[0]["x"]) for kind in ("chain", "reference")] == [1, 2]  # type: ignore[index]
    storage.save("chain", "k", {"x": np.array(3)}, {})
    assert int(storage.load("chain", "k")[0]["x"]) == 3  # type: ignore[index]
    assert storage.damaged == []


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _edit_description(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"ok"', b'"no"'))


@pytest.mark.parametrize("harm", [_cut, _flip, _empty, _edit_description])
def test_a_damaged_entry_is_removed_reported_and_can_be_made_again(storage: Storage, harm) -> None:
    storage.save("chain", "abc", ARRAYS, {"state": "ok"})
    harm(entry(storage))
    assert storage.load("chain", "abc") is None
    assert not list(storage.folder.rglob("*.entry"))
    assert storage.damaged == ["The stored chain 'abc' was damaged; it was removed and is made again."]
    storage.save("chain", "abc", ARRAYS, {"state": "ok"})
    assert storage.load("chain", "abc") is not None
    assert len(storage.damaged) == 1


def test_an_interrupted_write_leaves_the_old_entry_and_no_rest(storage: Storage, monkeypatch) -> None:
    storage.save("chain", "k", {"x": np.array(1)}, {})

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        storage.save("chain", "k", {"x": np.array(2)}, {})
    assert int(storage.load("chain", "k")[0]["x"]) == 1  # type: ignore[index]
    assert [path.name for path in (storage.folder / "chain").iterdir()] == ["k.entry"]


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    expected = r"^Expected a cache folder that can be read and written; got '.*file.cache' \(Not a directory\): name an"
    with pytest.raises(ValueError, match=expected):
        Storage(tmp_path / "file" / "cache")
    monkeypatch.setenv("ELBOWROOM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ValueError, match=expected):
        default_storage()


def test_a_folder_that_breaks_later_is_one_sentence(storage: Storage) -> None:
    (storage.folder / "chain").write_text("in the way")
    with pytest.raises(ValueError, match="^Expected a cache folder that can be read and written"):
        storage.save("chain", "k", {}, {})


@pytest.mark.parametrize(
    ("kind", "key", "arrays", "expected"),
    [
        ("../up", "k", {}, "Expected letters, digits.* got '../up'"),
        ("chain", "a/b", {}, "Expected letters, digits.* got 'a/b'"),
        ("chain", "", {}, "Expected letters, digits.* got ''"),
        ("chain", "k", {"x": np.array([object()])}, "Expected arrays of numbers or text to store; x holds Python"),
    ],
)
def test_misuse_is_refused(storage: Storage, kind: str, key: str, arrays: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        storage.save(kind, key, arrays, {})


def test_the_environment_names_the_default_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ELBOWROOM_CACHE", str(tmp_path / "mine"))
    assert default_storage().folder == tmp_path / "mine"
    monkeypatch.delenv("ELBOWROOM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "platform"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_storage().folder.name == "elbowroom"
    assert tmp_path in default_storage().folder.parents
