"""A store behind an fsspec URL: conditional puts make an entry appear once, a config uploaded last makes a set whole."""

from __future__ import annotations

import contextlib
import datetime
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xpatch.errors import BackendError, FormatError, XpatchError
from xpatch.patches.limits import Limits
from xpatch.patches.store import CONFIG_FILE, SIGNATURE_FILE, TENSOR_FILE, load, save
from xpatch.patches.types import PatchSet

#: Protocols whose `pipe_file(mode="create")` is one conditional request (s3fs, gcsfs, adlfs). They know no folders either.
CONDITIONAL = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss"}
_WAITS = (0.1, 0.5)  # seconds before another try: S3 answers 409 while another conditional request is under way
_MEMORY = "memory"
_MEMORY_LOCK = threading.Lock()  # fsspec's memory file system looks, then writes


class RemotePlace:
    """See `xpatch.store.place.Place`."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = url.rstrip("/") if not url.endswith("://") else url
        self.system, self.root = _filesystem(url, options)
        protocol = self.system.protocol
        self.protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.exclusive = bool(self.protocols & {*CONDITIONAL, _MEMORY})

    def where(self, path: str = "") -> str:
        return f"{self.url.rstrip('/')}/{path}" if path else self.url

    def names(self, folder: str) -> list[str]:
        with self._reached(folder, "listed"):
            self.system.invalidate_cache()  # another process may have written since
            try:
                found = self.system.ls(self._at(folder).rstrip("/"), detail=False)
            except FileNotFoundError:
                return []
            return sorted(str(path).rstrip("/").rsplit("/", 1)[-1] for path in found)

    def files(self, folder: str) -> list[str]:
        with self._reached(folder, "listed"):
            self.system.invalidate_cache()
            try:
                found = self.system.find(self._at(folder))
            except FileNotFoundError:
                return []
            start = len(self.root) + 1
            return sorted(str(path)[start:] for path in found if not str(path).endswith("/"))

    def read(self, paths: Iterable[str]) -> dict[str, bytes]:
        wanted = list(paths)
        if not wanted:
            return {}
        with self._reached(wanted[0], "read"):
            # One call for all: object stores answer many at a time.
            found = self.system.cat([self._at(path) for path in wanted], on_error="return")
            answers = {path: found.get(self._at(path), FileNotFoundError()) for path in wanted}
        for path, answer in answers.items():
            if isinstance(answer, Exception) and not isinstance(answer, FileNotFoundError):
                with self._reached(path, "read"):
                    raise answer
        return {path: bytes(answer) for path, answer in answers.items() if not isinstance(answer, Exception)}

    def create(self, path: str, data: bytes) -> bool:
        if not self.exclusive:
            return self._create_by_looking(path, data)
        for wait in (*_WAITS, None):
            try:
                self._pipe(path, data, mode="create")
                return True
            except Exception as error:  # a condition not met, a lost answer, a conflict: what lies there now decides
                there = self.read([path]).get(path)
                if there is not None:
                    return there == data
                if wait is None or isinstance(error, (PermissionError, FileNotFoundError)):
                    raise self._unreachable(path, "written", error) from error
                time.sleep(wait)
        return False

    def _create_by_looking(self, path: str, data: bytes) -> bool:
        if path in self.read([path]):
            return False
        self.replace(path, data)
        return self.read([path]).get(path) == data

    def put(self, folder: str, patches: PatchSet) -> None:
        # `xpatch.save` alone knows the files of a set; they go through a scratch folder.
        with tempfile.TemporaryDirectory(prefix="xpatch-") as scratch:
            written = Path(save(patches, Path(scratch) / folder.rsplit("/", 1)[-1]))
            for file in sorted(written.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
                self.replace(f"{folder}/{file.name}", file.read_bytes())

    def load(self, folder: str, limits: Limits) -> PatchSet:
        most = {
            CONFIG_FILE: limits.config_bytes,
            TENSOR_FILE: limits.tensor_bytes + limits.header_bytes,
            SIGNATURE_FILE: limits.signature_bytes,
        }
        files = {}
        for name, size in most.items():
            with self._reached(f"{folder}/{name}", "read"), contextlib.suppress(FileNotFoundError):
                # One byte more than may be, so that `load` sees a file that is too large, and no more than that.
                files[name] = bytes(self.system.cat_file(self._at(f"{folder}/{name}"), start=0, end=size + 9))
        try:
            return load(files, limits=limits)
        except FormatError as error:
            raise FormatError(f"{self.where(folder)}: {error}") from None

    def replace(self, path: str, data: bytes) -> None:
        with self._reached(path, "written"):
            self._pipe(path, data)

    def touch(self, folder: str) -> None:
        for path, data in self.read([f"{folder}/{CONFIG_FILE}"]).items():
            self.replace(path, data)

    def age(self, path: str) -> float | None:
        now = datetime.datetime.now(datetime.timezone.utc)
        ages = []
        for file in self.files(path) or [path]:
            with self._reached(file, "read"):
                try:
                    written = self.system.modified(self._at(file))
                except (FileNotFoundError, NotImplementedError):
                    return None
            aware = written if written.tzinfo else written.replace(tzinfo=datetime.timezone.utc)
            ages.append((now - aware).total_seconds())
        return min(ages)

    def move(self, source: str, target: str) -> bool:
        files = sorted(self.files(source), key=lambda path: path.endswith(CONFIG_FILE))
        for path, data in self.read(files).items():
            self.replace(f"{target}{path[len(source) :]}", data)
        self.remove(source)
        return bool(files)

    def remove(self, path: str) -> None:
        with self._reached(path, "deleted"), contextlib.suppress(FileNotFoundError):
            self.system.rm(self._at(path), recursive=True)

    def prepare(self, mark: str) -> None:
        """Try an exclusive create on the mark, which is there, with the bytes it has: it must be refused."""
        if self.exclusive:
            try:
                self._pipe(mark, self.read([mark])[mark], mode="create")
            except Exception:
                return
            self.exclusive = False
        warnings.warn(
            f"{self.url}: this place has no exclusive create, so two publishers at the same moment may both believe to have moved a "
            "pointer, and one move is lost; let one process publish at a time, or keep the store in a local folder, on S3, GCS or Azure",
            UserWarning,
            stacklevel=2,
        )

    def check_writable(self) -> None:
        """Only a write can tell."""

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"

    def _pipe(self, path: str, data: bytes, **mode: str) -> None:
        if not self.protocols & {*CONDITIONAL, _MEMORY}:
            self.system.makedirs(self._at(path).rsplit("/", 1)[0], exist_ok=True)
        with _MEMORY_LOCK if _MEMORY in self.protocols else contextlib.nullcontext():
            self.system.pipe_file(self._at(path), data, **mode)

    @contextlib.contextmanager
    def _reached(self, path: str, verb: str) -> Iterator[None]:
        try:
            yield
        except XpatchError:
            raise
        except FileNotFoundError as error:
            if verb in ("read", "listed", "deleted"):
                raise
            raise self._unreachable(path, verb, error) from error
        except Exception as error:  # every client has errors of its own
            raise self._unreachable(path, verb, error) from error

    def _unreachable(self, path: str, verb: str, error: Exception) -> FormatError:
        reason = str(error).strip() or type(error).__name__
        return FormatError(
            f"{self.where(path)}: expected a place that can be {verb}, found: {reason}; "
            "check that the address exists and is reachable, the credentials, and your rights"
        )


def _filesystem(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError:
        raise BackendError(f'{url}: a store at a URL needs fsspec; run: pip install "xpatch[remote]"') from None
    try:
        system, root = url_to_fs(url, **options)
    except ImportError as error:
        raise BackendError(f"{url}: a package for this address is missing: {error}") from None
    except Exception as error:
        raise FormatError(
            f"{url}: expected a folder or a URL that fsspec knows, found: {error}; check the address and the storage options"
        ) from None
    return system, str(root).rstrip("/")
