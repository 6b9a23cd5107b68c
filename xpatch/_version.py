"""The version, from the installed package's metadata (written once, in pyproject.toml)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("xpatch")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
