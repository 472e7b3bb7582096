"""Finished work on disk: named arrays with a description, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Storage:
    """A folder of entries, each found by its kind and its key.

    An entry is one file: the SHA-256 of all that follows, the description as a line of JSON, the arrays as NPZ.
    It is written beside its place and then moved there, so that a killed process leaves no half entry; what is
    damaged by other means fails its checksum, and is removed and reported.

    Attributes:
        folder: Where the entries lie; made if it is not there.
        damaged: One sentence for each damaged entry that was met and removed.

    Raises:
        ValueError: The folder cannot be made or written.
    """

    folder: Path
    damaged: list[str] = field(default_factory=list, init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        # Tried now, because a sampler should not learn it after minutes of work.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise _unusable(self.folder, error) from error

    def load(self, kind: str, key: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """The arrays and the description that were saved, or None if there are none or they are damaged.

        Raises:
            ValueError: The file is there and cannot be read, or kind or key is no file name.
        """
        path = self._path(kind, key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(path, error) from error
        checksum, _, body = content.partition(b"\n")
        if checksum.decode("ascii", "replace") != hashlib.sha256(body).hexdigest():
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise _unusable(path, error) from error
            self.damaged.append(f"The stored {kind} '{key[:12]}' was damaged; it was removed and is made again.")
            return None
        description, _, payload = body.partition(b"\n")
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        return arrays, json.loads(description)

    def save(self, kind: str, key: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
        """Keep arrays and a description that JSON can hold, in place of an earlier entry of that kind and key.

        Raises:
            ValueError: The folder cannot be written, an array holds Python objects, or kind or key is no file name.
        """
        path = self._path(kind, key)
        objects = sorted(name for name, values in arrays.items() if np.asarray(values).dtype.hasobject)
        if objects:
            raise ValueError(f"Expected arrays of numbers or text to store; {', '.join(objects)} holds Python objects.")
        payload = io.BytesIO()
        np.savez(payload, allow_pickle=False, **{name: np.asarray(values) for name, values in arrays.items()})
        body = json.dumps(dict(meta)).encode() + b"\n" + payload.getvalue()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _replace(path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        except OSError as error:
            raise _unusable(path.parent, error) from error

    def _path(self, kind: str, key: str) -> Path:
        for text in (kind, key):
            if not _NAME.fullmatch(text):
                raise ValueError(f"Expected letters, digits, '_', '-' or '.' in an entry's kind and key; got '{text}'.")
        return self.folder / kind / f"{key}.entry"


def default_storage() -> Storage:
    """The storage in the folder that `ELBOWROOM_CACHE` names, else in the platform's cache folder.

    Raises:
        ValueError: The folder cannot be made or written.
    """
    return Storage(cache_folder())


def cache_folder() -> Path:
    """The folder that `ELBOWROOM_CACHE` names, else the platform's cache folder for elbowroom."""
    return Path(os.environ.get("ELBOWROOM_CACHE") or platformdirs.user_cache_dir("elbowroom", appauthor=False))


def _replace(path: Path, content: bytes) -> None:
    """Write beside the path, then move: a reader sees the old entry or the new one."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _unusable(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"Expected a cache folder that can be read and written; got '{path}' ({error.strerror or error}): "
        "name another one in ELBOWROOM_CACHE, or run without a cache."
    )
