"""A store in a local folder: hard links make an entry appear whole and once, renames make sets appear whole."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from xpatch.errors import FormatError
from xpatch.patches.limits import Limits
from xpatch.patches.store import CONFIG_FILE, load, save
from xpatch.patches.types import PatchSet
from xpatch.store.place import TEMPORARY

_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
LOCK_FILE = "lock"


class LocalPlace:
    """See `xpatch.store.place.Place`."""

    def __init__(self, root: Path) -> None:
        with self._reached(root):
            self.root = root.expanduser().resolve()
            if self.root.exists() and not self.root.is_dir():
                raise FormatError(f"{self.root}: expected a folder for a patch store, found a file; give another path")

    def where(self, path: str = "") -> str:
        return str(self.root / path)

    def names(self, folder: str) -> list[str]:
        with self._reached(self.root / folder):
            try:
                return sorted(os.listdir(self.root / folder))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def files(self, folder: str) -> list[str]:
        with self._reached(self.root / folder):
            found = [Path(at, name) for at, _, names in os.walk(self.root / folder, onerror=_raise) for name in names]
            return sorted(path.relative_to(self.root).as_posix() for path in found)

    def read(self, paths: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for path in paths:
            with self._reached(self.root / path), contextlib.suppress(FileNotFoundError):
                found[path] = (self.root / path).read_bytes()
        return found

    def create(self, path: str, data: bytes) -> bool:
        target = self.root / path
        with self._reached(target):
            _make_folder(target.parent)
            try:
                with self._written(data) as temporary:
                    self._name(temporary, target)
            except FileExistsError:
                return target.read_bytes() == data  # a network file system may repeat a link that worked
            _sync_folder(target.parent)
        return True

    @contextlib.contextmanager
    def _written(self, data: bytes) -> Iterator[Path]:
        """A file with these bytes, on disk, under a name nobody looks for; gone afterwards unless it was renamed."""
        temporary = self.root / TEMPORARY / uuid.uuid4().hex
        _make_folder(temporary.parent)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    def _name(self, temporary: Path, target: Path) -> None:
        """Give a written file its name. Raises FileExistsError where the name is taken."""
        if os.name == "nt":  # where a rename never replaces
            os.rename(temporary, target)
            return
        try:
            os.link(temporary, target)
            return
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        import fcntl

        with open(self.root / LOCK_FILE, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone with its process, however that ends
            if target.exists():
                raise FileExistsError(target)
            os.rename(temporary, target)

    def put(self, folder: str, patches: PatchSet) -> None:
        target = self.root / folder
        staging = self.root / TEMPORARY / uuid.uuid4().hex
        try:
            with self._reached(target):
                _make_folder(target.parent)
                written = Path(save(patches, staging / target.name))
                _sync_folder(written)
                try:
                    os.rename(written, target)
                except OSError:
                    if not (target / CONFIG_FILE).is_file():  # else another writer of the same set was first
                        raise
                _sync_folder(target.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def load(self, folder: str, limits: Limits) -> PatchSet:
        return load(self.root / folder, limits=limits)

    def replace(self, path: str, data: bytes) -> None:
        target = self.root / path
        with self._reached(target), self._written(data) as temporary:
            os.replace(temporary, target)
            _sync_folder(target.parent)

    def touch(self, folder: str) -> None:
        with self._reached(self.root / folder), contextlib.suppress(FileNotFoundError):
            os.utime(self.root / folder / CONFIG_FILE)

    def age(self, path: str) -> float | None:
        place = self.root / path
        with self._reached(place):
            try:
                inside = list(place.rglob("*")) if place.is_dir() else []
                return time.time() - max(item.stat().st_mtime for item in [place, *inside])
            except FileNotFoundError:
                return None

    def move(self, source: str, target: str) -> bool:
        with self._reached(self.root / target):
            _make_folder((self.root / target).parent)
            try:
                os.rename(self.root / source, self.root / target)
            except FileNotFoundError:
                return False
        return True

    def remove(self, path: str) -> None:
        place = self.root / path
        with self._reached(place), contextlib.suppress(FileNotFoundError):
            if place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()

    def prepare(self, mark: str) -> None:
        """Nothing to find out: links or a lock, `create` is exclusive."""

    def check_writable(self) -> None:
        above = self.root
        while not above.exists() and above != above.parent:
            above = above.parent
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise FormatError(
                f"{self.root}: expected a folder that can be written, found no permission (or no folder) at {above}; "
                "check the permissions, or choose another folder"
            )

    @contextlib.contextmanager
    def _reached(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FormatError(
                f"{path}: expected a folder that can be read and written, found: {error.strerror or error}; "
                "check the permissions, the free space, and that the disk is there"
            ) from error


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on disk before what lies in it."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Names on disk, as fsync puts bytes there. Windows has no such call; there the file system's journal does it."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot, such as some network ones
            raise
    finally:
        os.close(handle)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
