"""Hostile patch folders from valid ones: `mutated(folders, rng)`. Half of them carry the fingerprint an attacker would compute."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Mapping
from typing import Any

from .fuzz_files import CONFIG, SIGNATURE, TENSORS, Folder, files_of, header_of, tensor_file
from .fuzz_meanings import consistent, strange, with_fingerprint

_RAW = (
    "NaN", "-Infinity", "1e999", "-1e999", "1" * 400, "1" * 5000, "0." + "0" * 400 + "1", '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', "[" * 70 + "]" * 70,
    "[" * 5000, "[" * 5000 + "]" * 5000, '{"a":' * 300 + "1" + "}" * 300, '{"a":1,"a":2}', "1e5", "-0", "01", "0x10", "'x'", "\ufeff1", "", "true", "null",
    '"' + "x" * 3000 + '"',
)  # fmt: skip
_DTYPES: tuple[Any, ...] = (
    "F16",
    "BF16",
    "F64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "C64",
    "F32 ",
    "f32",
    "",
    "X",
    32,
    None,
    [],
)
_NUMBERS = (float("nan"), float("inf"), -float("inf"), 3.4e38, 1e-45, -0.0, 0.0)
_PLACE = "\ue000here\ue000"

Files = dict[str, bytes]


def mutated(folders: Mapping[str, Folder], rng: random.Random) -> tuple[str, Files]:
    """(the name of the folder it was made from, the bytes of a damaged or hostile one)."""
    name = rng.choice(list(folders))
    folder = folders[name]
    kinds = (_bytes, _json, _tensors, _header, _mixed, consistent)
    kind = rng.choices(kinds, (4, 6, 4, 4, 2, 6))[0]
    files = kind(folder, folders, rng)
    if rng.random() < 0.05:
        files = _damaged(files, rng)
    return name, files


def _bytes(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> Files:
    files = files_of(folder)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = _damaged(files, rng)
    return files


def _damaged(files: Files, rng: random.Random) -> Files:
    """One file with flipped bits, foreign bytes, or a piece cut, doubled, moved or put in."""
    name = rng.choice(list(files))
    data = bytearray(files[name])
    if not data:
        return files
    # Most damage near the front: there lie the header's length and its first entries.
    at = rng.randrange(min(len(data), 64)) if rng.random() < 0.3 else rng.randrange(len(data))
    size = rng.choice((1, 1, 2, 4, 8, 16, 64, len(data)))
    piece = bytes(data[at : at + size])
    other = bytes(files[rng.choice(list(files))])
    start = rng.randrange(len(other) or 1)
    choice = rng.randrange(8)
    if choice == 0:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif choice == 1:
        data[at] = rng.randrange(256)
    elif choice == 2:
        data[at : at + size] = other[start : start + size]
    elif choice == 3:
        del data[at:]
    elif choice == 4:
        data[at:at] = piece
    elif choice == 5:
        del data[at : at + size]
    elif choice == 6:
        data[at:at] = rng.choice(
            (rng.randbytes(size % 65), b"\x00" * 8, b"\xff" * 8, b'"', b"[", b"{", b"}", b",", b"\\", b"\xef\xbb\xbf")
        )
    else:
        data[:8] = rng.choice((2**63, 2**64 - 1, 0, 1, len(data), max(0, len(data) - 8), 2**32, 100_000_001)).to_bytes(
            8, "little"
        )
    return {**files, name: bytes(data)}


def _json(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> Files:
    """The config with values of a wrong type or size, keys removed, doubled, renamed or moved."""
    config = json.loads(json.dumps(folder.config))
    raw: str | None = None
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holder, key = _somewhere(config, rng)
        if holder is None:
            break
        raw = _change(config, holder, key, rng) or raw
    if rng.random() < 0.6:
        config = with_fingerprint(config, folder.tensors)
    files = files_of(Folder(config, folder.tensors, folder.signature))
    if raw is not None:  # what no JSON writer would write
        files[CONFIG] = files[CONFIG].replace(
            json.dumps(_PLACE, ensure_ascii=False).encode(), raw.encode("utf-8", "surrogatepass"), 1
        )
    elif rng.random() < 0.05:
        text = files[CONFIG].decode("utf-8", "surrogatepass")
        files[CONFIG] = text.encode(rng.choice(("utf-16", "utf-32", "utf-8-sig", "utf-7")), "replace")
    return files


def _change(config: Any, holder: Any, key: Any, rng: random.Random) -> str | None:
    choice = rng.randrange(9)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[str(strange(rng))] = holder.pop(key)
    elif choice == 2 and isinstance(holder, dict):
        holder[str(strange(rng))] = copy.deepcopy(holder[key])
    elif choice == 3 and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[key]))
    elif choice == 4:
        other, place = _somewhere(config, rng)
        if other is not None:
            holder[key] = json.loads(json.dumps(other[place]))
    elif choice == 5 and isinstance(holder[key], int):
        holder[key] += rng.choice((-1, 1, 2, 100, 10**6, 10**9))
    elif choice == 6:
        holder[key] = _PLACE
        return rng.choice(_RAW)
    elif choice == 7 and isinstance(holder, dict):  # the key twice, with the same value or another
        shown = json.dumps(holder[key])
        holder[key] = _PLACE
        return f"{shown}, {json.dumps(str(key))}: {rng.choice((shown, 'null', '1'))}"
    else:
        holder[key] = strange(rng)
    return None


def _tensors(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> Files:
    """Other numbers, NaN and infinities, tensors exchanged, reshaped, lost or added; often with the true fingerprint."""
    tensors = {name: value.copy() for name, value in folder.tensors.items()}
    for _ in range(rng.choice((1, 1, 2))):
        if not tensors:
            break
        name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
        choice = rng.randrange(7)
        if choice <= 1 and tensors[name].size:
            tensors[name].reshape(-1)[rng.randrange(tensors[name].size)] = rng.choice(_NUMBERS)
        elif choice == 2:
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif choice == 3:
            tensors[name] = tensors[name].T.copy()
        elif choice == 4:
            tensors[rng.choice(("x", "neurons.0.more", "masks.m.keys", "../x", "__metadata__", f"{name}.x", ""))] = (
                tensors.pop(name)
            )
        elif choice == 5:
            del tensors[name]
        else:
            tensors[name] = tensors[name].repeat(2, axis=0)
    config = folder.config if rng.random() < 0.3 else with_fingerprint(folder.config, tensors)
    return files_of(Folder(config, tensors, folder.signature))


def _header(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> Files:
    """A safetensors header that lies about dtypes, shapes, places, names or its own length."""
    files = files_of(folder)
    header = header_of(folder.tensors, folder.config["fingerprint"])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)] if names else header["__metadata__"]
    choice = rng.randrange(8)
    if choice == 0:
        entry["dtype"] = rng.choice(_DTYPES)
    elif choice == 1:
        entry["shape"] = rng.choice(
            ([], [0], [2**63], [2**32, 2**32], [2**62, 4], [-1, 6], [1.0, 2], [True], None, "x", [10**30], [1] * 100)
        )
    elif choice == 2:
        shape = entry.setdefault("shape", [])
        entry["shape"] = rng.choice(([*shape, 1], [1, *shape], shape[::-1], [0, *shape]))
    elif choice == 3 and "data_offsets" in entry:
        entry["data_offsets"][rng.randrange(2)] += rng.choice((-4, -1, 1, 4, 8, 10**6, 2**63, 2**64, 10**30))
    elif choice == 4 and len(names) > 1:  # two tensors at one place
        entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
    elif choice == 5:
        header["__metadata__"] = rng.choice(
            (
                {},
                None,
                [],
                {"xpatch_fingerprint": 1},
                {"xpatch_fingerprint": "0" * 64},
                {**header["__metadata__"], "x": "y"},
            )
        )
    elif choice == 6:
        entry.pop(rng.choice(list(entry)), None)
        if rng.random() < 0.5:
            entry["more"] = strange(rng)
    text = json.dumps(header)
    if choice == 7:
        doubled = rng.choice(names) if names else "__metadata__"
        again = json.dumps(header[doubled])
        text = text[:-1] + f", {json.dumps(doubled)}: {again}" + "}"
    data = bytearray(tensor_file(text, folder.tensors))
    if rng.random() < 0.15:
        data += rng.randbytes(rng.choice((1, 4, 100)))
    if rng.random() < 0.1:
        at = 8 + int.from_bytes(data[:8], "little")
        data[at:at] = b"\x00" * rng.choice((1, 4, 8))
    return {**files, TENSORS: bytes(data)}


def _mixed(folder: Folder, folders: Mapping[str, Folder], rng: random.Random) -> Files:
    """The files of two sets together, with or without the other's fingerprint."""
    other = folders[rng.choice(list(folders))]
    config = folder.config if rng.random() < 0.5 else {**folder.config, "fingerprint": other.config["fingerprint"]}
    files = files_of(Folder(config, other.tensors, other.signature))
    if rng.random() < 0.2:
        files.pop(rng.choice(list(files)))
    if rng.random() < 0.2:
        files[SIGNATURE] = rng.choice(
            (
                b"",
                b"{}",
                b"[]",
                files.get(CONFIG, b""),
                b'{"signature_version": 2}',
                b'{"signature_version": 1, "signatures": []}',
            )
        )
    return files


def _somewhere(value: Any, rng: random.Random) -> tuple[Any, Any]:
    """A container inside `value` and one of its keys, each place as likely as any other; (None, None) where there is none."""
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending:
        holder = pending.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, item in items:
            places.append((holder, key))
            pending.append(item)
    return rng.choice(places) if places else (None, None)
