"""What the commands read and where they write, checked before any work starts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from xpatch.errors import FormatError, MismatchError, XpatchError
from xpatch.patches.requests import EditRequest


def load_classifier(name: str) -> tuple[Any, Any]:
    """A sequence classifier and its tokenizer, in eval mode, in fp32: a folder on disk, or a bundled model's name.

    A folder of that name in the working directory wins over the bundled model. Nothing is downloaded.
    Raises `XpatchError` (no such folder), `FormatError` (not a model, or damaged), `MismatchError` (no classification head).
    """
    from xpatch import zoo

    folder = model_folder(name)
    if name in zoo.MODELS and folder == zoo.folder(name):
        with quiet_transformers():
            return zoo.load(name)
    return _from_pretrained(folder)


def model_folder(name: str) -> Path:
    """The folder `name`, or that of the bundled model of this name where there is no such folder.

    Raises `XpatchError` (no such folder), `FormatError` (not a model's).
    """
    from xpatch import zoo

    path = Path(name)
    if name in zoo.MODELS and not path.exists():
        return zoo.folder(name)
    if not path.exists():
        raise XpatchError(
            f"model folder {name} does not exist; give a folder saved with save_pretrained, or a bundled model: "
            f"{', '.join(sorted(zoo.MODELS))}"
        )
    if not (path / "config.json").is_file():
        raise FormatError(
            f"{name} is not a model folder: expected a folder with config.json, as save_pretrained writes it"
        )
    return path


def _from_pretrained(folder: Path) -> tuple[Any, Any]:
    import transformers

    try:
        with quiet_transformers():
            model, loading = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, local_files_only=True, output_loading_info=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the loaders raise many kinds for a damaged folder
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FormatError(f"model folder {folder} cannot be loaded as a sequence classifier: {reason}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise MismatchError(
            f"model folder {folder} holds no trained {type(model).__name__}: {len(missing)} tensors are missing, first {missing[0]}; "
            "give a model that was fine-tuned for sequence classification"
        )
    return model.float().eval(), tokenizer


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No loading bars and no warnings inside: what they say is either chatter or reported here as an error."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def check_method(method: str) -> None:
    """Raise `XpatchError` listing the known methods when `method` is none of them."""
    import xpatch

    known = sorted(xpatch.methods())
    if method not in known:
        raise XpatchError(f"unknown method {method!r}; methods: {', '.join(known)}")


def split_languages(text: str | None, requests: list[EditRequest]) -> list[str] | None:
    """`"en, de"` -> `["en", "de"]`; None stays None. Raises `MismatchError` for a language no request has a version in."""
    if text is None:
        return None
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    known = sorted({language for request in requests for language in request.versions})
    unknown = [language for language in wanted if language not in known]
    if unknown or not wanted:
        found = ", ".join(unknown) or "no language at all"
        raise MismatchError(f"--languages: {found} in no request; the requests have versions in {', '.join(known)}")
    return wanted


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE words as settings: a value is JSON where it can be read as such (8, 0.1, true, null), else text."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.strip():
            raise XpatchError(f"--set {word}: expected NAME=VALUE, such as --set learning_rate=0.001")
        try:
            found[name.strip()] = json.loads(value)
        except ValueError:
            found[name.strip()] = value
    return found


def check_out_folder(path: Path, *, overwrite: bool = False) -> None:
    """Raise before the work starts if a folder cannot be made at `path`, or if it holds something that is not to be replaced."""
    check_writable(path)
    if path.is_file():
        raise XpatchError(f"--out {path} is a file; give a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        if not (path / "patch_config.json").is_file():
            raise XpatchError(f"--out {path} holds other files; give a folder that does not exist yet")
        if not overwrite:
            raise XpatchError(
                f"--out {path} already holds a patch set; give another folder, or --overwrite to replace it"
            )


def check_out_file(path: Path, option: str = "--out") -> None:
    """Raise before the work starts if a file cannot be written at `path`."""
    check_writable(path, option)
    if path.is_dir():
        raise XpatchError(f"{option} {path} is a folder; give the path of a file")


def check_writable(path: Path, option: str = "--out") -> None:
    """Raise `XpatchError` if the nearest folder above `path` that exists is not a folder, or is not ours to write in."""
    above = path.absolute().parent
    while not above.exists() and above != above.parent:
        above = above.parent
    if not above.is_dir():
        raise XpatchError(f"{option} {path} cannot be made: {above} is not a folder")
    if not os.access(path if path.is_dir() else above, os.W_OK | os.X_OK):
        raise XpatchError(
            f"{option} {path} cannot be made: no permission to write in {path if path.is_dir() else above}"
        )


def needs(feature: str, module: str, extra: str) -> None:
    """Raise `XpatchError` naming the extra to install when an optional package is missing."""
    import importlib.util

    if importlib.util.find_spec(module) is None:
        raise XpatchError(
            f'{feature} needs the package {module}, which is not installed; pip install "xpatch[{extra}]"'
        )
