"""Signatures: made over a set's very content, lost with any change to it, and refused unless a trusted key made them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import xpatch
from xpatch.errors import BackendError, FormatError
from xpatch.patches import config, store
from xpatch.patches.keys import generate_key, public_key
from xpatch.patches.signatures import SIGNATURE_FILE, Signature, parse_signatures
from xpatch.patches.types import PatchSet

MakeSet = Callable[..., PatchSet]


@pytest.fixture
def key(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    generate_key(tmp_path / "release.key")
    return tmp_path / "release.key"


@pytest.fixture
def other_key(tmp_path: Path) -> Path:
    pytest.importorskip("cryptography")
    generate_key(tmp_path / "other.key")
    return tmp_path / "other.key"


def public(key: Path) -> Path:
    return Path(f"{key}.pub")


def test_a_signed_folder_loads_for_those_who_trust_the_key(make_set: MakeSet, tmp_path: Path, key: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    signed = xpatch.sign(folder, key)
    patches = xpatch.load(folder, trusted_keys=[public(key)])
    assert patches.signatures == signed.signatures and len(signed.signatures) == 1
    assert xpatch.verify(patches, public(key)) == signed.signatures[0].key_id
    after = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert after.pop(SIGNATURE_FILE) and after == before  # signing changes no other file
    assert patches.fingerprint == store.load(folder).fingerprint == signed.fingerprint


def test_the_key_id_is_the_digest_of_the_raw_public_key(tmp_path: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    made = generate_key(tmp_path / "k")
    loaded = serialization.load_pem_public_key((tmp_path / "k.pub").read_bytes())
    raw = loaded.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    assert made == hashlib.sha256(raw).hexdigest()
    assert os.name == "nt" or (tmp_path / "k").stat().st_mode & 0o777 == 0o600


def test_the_signature_is_plain_ed25519_over_a_message_of_its_own_domain(make_set: MakeSet, key: Path) -> None:
    """Anyone can check it without xpatch."""
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    signed = xpatch.sign(make_set(["a"]), key)
    checker = serialization.load_pem_public_key(public(key).read_bytes())
    message = b"xpatch patch set v1\0" + bytes.fromhex(signed.fingerprint)
    checker.verify(bytes.fromhex(signed.signatures[0].signature), message)


def test_several_keys_sign_one_set(make_set: MakeSet, tmp_path: Path, key: Path, other_key: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    for each in (key, other_key, key):
        xpatch.sign(folder, each)
    assert len(store.load(folder).signatures) == 2
    for each in (key, other_key):
        xpatch.load(folder, trusted_keys=public(each))


def test_keys_come_as_files_texts_digits_and_bytes(make_set: MakeSet, tmp_path: Path, key: Path) -> None:
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    raw = secret.private_bytes_raw(), secret.public_key().public_bytes_raw()
    (tmp_path / "hex").write_text(raw[0].hex() + "\n")
    (tmp_path / "hex.pub").write_text(raw[1].hex().upper() + "\n")
    patches = make_set(["a"])
    for private in (key, str(key), key.read_text(), key.read_bytes(), tmp_path / "hex", raw[0].hex(), raw[0]):
        signed = xpatch.sign(patches, private)
        for trusted in (
            public(key),
            public(key).read_text(),
            public(key).read_bytes(),
            tmp_path / "hex.pub",
            raw[1].hex(),
            raw[1],
        ):
            assert xpatch.verify(signed, [trusted]) == signed.signatures[0].key_id


def test_unsigned_and_foreign_sets_are_refused(make_set: MakeSet, tmp_path: Path, key: Path, other_key: Path) -> None:
    folder = store.save(make_set(["a"]), tmp_path / "x")
    with pytest.raises(FormatError, match=r"patch set 'x' \(.*\): expected a signature, found none"):
        xpatch.load(folder, trusted_keys=[public(key)])
    xpatch.sign(folder, other_key)
    with pytest.raises(FormatError, match="expected a signature by one of 1 trusted keys, found only"):
        xpatch.load(folder, trusted_keys=[public(key)])
    with pytest.raises(FormatError, match="expected a signature by one of 0 trusted keys"):
        xpatch.load(folder, trusted_keys=[])
    assert store.load(folder).signatures  # without trusted_keys a signature asks nothing


def test_a_forged_signature_is_refused(make_set: MakeSet, tmp_path: Path, key: Path, other_key: Path) -> None:
    """The trusted key's id, but another key's signature; then the signature of another set."""
    folder = Path(store.save(make_set(["a"]), tmp_path / "x"))
    xpatch.sign(folder, key)
    place = folder / SIGNATURE_FILE
    genuine = json.loads(place.read_text())
    forged = json.loads(place.read_text())
    forged["signatures"][0]["signature"] = xpatch.sign(make_set(["a"]), other_key).signatures[0].signature
    place.write_text(json.dumps(forged))
    with pytest.raises(FormatError, match="expected a genuine signature by .* was altered, do not apply it"):
        xpatch.load(folder, trusted_keys=[public(key)])
    store.save(make_set(["b"]), tmp_path / "y")
    genuine["signatures"][0]["fingerprint"] = store.load(tmp_path / "y").fingerprint
    (tmp_path / "y" / SIGNATURE_FILE).write_text(json.dumps(genuine))
    with pytest.raises(FormatError, match="expected a genuine signature"):
        xpatch.load(tmp_path / "y", trusted_keys=[public(key)])


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (store.CONFIG_FILE, b'"REFUTES"', b'"SUPPORTS"'),
        (store.CONFIG_FILE, b'"relu"', b'"gelu"'),
        (store.CONFIG_FILE, b'"expires": "2030-01-01"', b'"expires": "2040-01-01"'),
    ],
)
def test_a_changed_set_is_refused_even_with_its_fingerprint_made_anew(
    make_set: MakeSet, tmp_path: Path, key: Path, file: str, old: bytes, new: bytes
) -> None:
    patches = make_set(["a"])
    record = patches.edits[0]
    assert record.request is not None
    dated = replace(record, request=record.request.model_copy(update={"expires": "2030-01-01"}))
    folder = Path(store.save(replace(patches, edits=(dated,)), tmp_path / "x"))
    xpatch.sign(folder, key)
    place = folder / file
    place.write_bytes(place.read_bytes().replace(old, new))
    with pytest.raises(FormatError, match=r"found ([0-9a-f]{12}); the config or the tensors were changed") as told:
        xpatch.load(folder, trusted_keys=[public(key)])
    recomputed = attacker(place.read_bytes(), folder, str(told.value))
    with pytest.raises(FormatError, match="expected a signature, found none for this content"):
        xpatch.load(recomputed, trusted_keys=[public(key)])
    assert store.load(recomputed).signatures == ()


def attacker(config_bytes: bytes, folder: Path, told: str) -> dict[str, bytes]:
    """The same files with the fingerprint of what they now hold in all three places, as anyone can compute it."""
    data = json.loads(config_bytes)
    real = data["fingerprint"]
    new = config.fingerprint(_parsed(data, folder))
    assert new.startswith(told.split("found ")[1][:12])
    return {path.name: path.read_bytes().replace(real.encode(), new.encode()) for path in folder.iterdir() if path.name != SIGNATURE_FILE} | {
        SIGNATURE_FILE: (folder / SIGNATURE_FILE).read_bytes()
    }  # fmt: skip


def _parsed(data: dict[str, Any], folder: Path) -> PatchSet:
    parsed = config.parse_config(json.dumps(data), where="here")
    import safetensors.torch

    tensors = safetensors.torch.load_file(folder / store.TENSOR_FILE)
    return store._assemble(parsed, tensors, None, ())


def test_a_changed_set_loses_its_signatures(make_set: MakeSet, tmp_path: Path, key: Path) -> None:
    signed = xpatch.sign(make_set(["a", "b"]), key)
    assert len(signed.signatures) == 1
    for other in (
        signed.select("a"),
        signed.drop("a"),
        signed + make_set(["c"]),
        signed.redact(),
        signed.redact("author"),
    ):
        assert other.signatures == ()
        with pytest.raises(FormatError, match="sign it .*again after any change, for select, drop, \\+ and redact"):
            xpatch.verify(other, public(key))
    for same in (replace(signed, name="other"), signed.select(["a", "b"]), pickle.loads(pickle.dumps(signed))):
        assert xpatch.verify(same, public(key)) == signed.signatures[0].key_id
    assert signed.fingerprint == make_set(["a", "b"]).fingerprint


def test_signatures_travel_with_a_saved_set_and_not_with_another(make_set: MakeSet, tmp_path: Path, key: Path) -> None:
    folder = store.save(xpatch.sign(make_set(["a"]), key), tmp_path / "x")
    xpatch.load(folder, trusted_keys=public(key))
    store.save(make_set(["b"]), folder)
    assert sorted(path.name for path in Path(folder).iterdir()) == [
        store.CARD_FILE,
        store.CONFIG_FILE,
        store.TENSOR_FILE,
    ]


def test_signing_behind_a_url(make_set: MakeSet, key: Path) -> None:
    pytest.importorskip("fsspec")
    url = store.save(make_set(["a"]), "memory://signing/x")
    xpatch.sign(url, key)
    assert xpatch.load(url, trusted_keys=public(key)).signatures
    store.save(make_set(["b"]), url)
    assert store.load(url).signatures == ()


def test_what_is_no_key(make_set: MakeSet, tmp_path: Path, key: Path) -> None:
    rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")
    serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
    patches, kinds = make_set(["a"]), serialization
    secret = serialization.load_pem_private_key(key.read_bytes(), None)
    locked = secret.private_bytes(kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.BestAvailableEncryption(b"x"))
    foreign = rsa.generate_private_key(65537, 2048)
    foreign_text = foreign.private_bytes(kinds.Encoding.PEM, kinds.PrivateFormat.PKCS8, kinds.NoEncryption())
    foreign_public = foreign.public_key().public_bytes(kinds.Encoding.PEM, kinds.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "empty").write_bytes(b"")
    for given, told in (
        (locked, "found an encrypted one; decrypt it: openssl pkey"),
        (foreign_text, "expected an ed25519 key, found RSAPrivateKey"),
        (public(key), "expected an ed25519 private key as PEM or 64 hex digits"),
        (tmp_path / "nowhere", "expected a file with a private key, found nothing"),
        (tmp_path / "empty", "found something else"),
        (tmp_path, "expected a regular file"),
        (b"short", "private key given as bytes: expected an ed25519 private key"),
        (7, "found int"),
    ):
        with pytest.raises(FormatError, match=told) as error:
            xpatch.sign(patches, given)  # type: ignore[arg-type]
        assert key.read_text().splitlines()[1] not in str(error.value)
    for given, told in (
        (key, "expected a public key, found a private one"),
        (foreign_public, "found RSAPublicKey"),
        (b"x" * 31, "expected an"),
    ):
        with pytest.raises(FormatError, match=told):
            xpatch.verify(patches, [given])


def test_keys_are_never_replaced(tmp_path: Path, key: Path) -> None:
    before = key.read_bytes()
    for taken in (key, tmp_path / "n"):
        (tmp_path / "n.pub").touch()
        with pytest.raises(FormatError, match="keys are never replaced"):
            generate_key(taken)
    assert key.read_bytes() == before and not (tmp_path / "n").exists()
    with pytest.raises(FormatError, match="expected a place for a key"):
        generate_key(tmp_path / "nowhere" / "k")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d.update(signature_version=2), "signature version 1, found 2, written by a newer xpatch"),
        (lambda d: d["signatures"][0].update(algorithm="none"), "algorithm: Input should be 'ed25519'"),
        (lambda d: d["signatures"][0].update(signature="00"), "signature: String should match pattern"),
        (lambda d: d["signatures"][0].update(more=1), "Extra inputs are not permitted"),
        (lambda d: d["signatures"].append(d["signatures"][0]), "signs twice"),
        (lambda d: d.update(signatures=d["signatures"] * 101), "at most 100 items"),
        (lambda d: d.pop("signatures"), "Field required"),
    ],
)
def test_damaged_signature_files(
    make_set: MakeSet, tmp_path: Path, key: Path, change: Callable[..., Any], told: str
) -> None:
    """Refused with or without trusted keys: a folder is whole or it is not."""
    folder = Path(store.save(xpatch.sign(make_set(["a"]), key), tmp_path / "x"))
    data = json.loads((folder / SIGNATURE_FILE).read_text())
    change(data)
    (folder / SIGNATURE_FILE).write_text(json.dumps(data))
    with pytest.raises(FormatError, match=told):
        store.load(folder)


def test_sets_carry_signatures_only(make_set: MakeSet) -> None:
    with pytest.raises(FormatError, match="patch set, signatures: expected Signature values, found str"):
        replace(make_set(["a"]), signatures=("x",))
    stale = Signature("a" * 64, "b" * 64, "c" * 128)
    assert replace(make_set(["a"]), signatures=(stale,)).signatures == ()
    with pytest.raises(FormatError, match="expected JSON"):
        parse_signatures(b"", where="here", limits=xpatch.Limits())


def test_missing_cryptography_is_named(make_set: MakeSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for call in (
        lambda: xpatch.sign(make_set(["a"]), b"x" * 32),
        lambda: xpatch.verify(make_set(["a"]), [b"x" * 32]),
        lambda: generate_key(tmp_path / "k"),
        lambda: public_key(b"x" * 32),
    ):
        with pytest.raises(BackendError, match=r'run: pip install "xpatch\[sign\]"'):
            call()
