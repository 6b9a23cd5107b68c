"""`xpatch sign`: keys, signatures and their check, for people and for scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import xpatch
from xpatch import PatchNeurons, PatchSet

pytest.importorskip("cryptography")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    part = PatchNeurons("bert.encoder.layer.1", torch.randn(2, 4), torch.randn(2), torch.randn(2, 4), "relu")
    return Path(xpatch.save(PatchSet({"neurons.0": part}), tmp_path / "fixes"))


@pytest.fixture
def key(run: Callable[..., Any], tmp_path: Path) -> Path:
    assert run("sign", "--generate-key", tmp_path / "release.key").code == 0
    return tmp_path / "release.key"


def test_help_has_examples(run: Callable[..., Any]) -> None:
    assert run("sign", "--help").out.count("Example: xpatch sign") == 3


def test_make_a_key_sign_and_verify(run: Callable[..., Any], folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "k"
    made = json.loads(run("sign", "--generate-key", key, "--json").out)
    assert made == {"key_id": made["key_id"], "private_key": str(key), "public_key": f"{key}.pub"}
    signed = json.loads(run("sign", folder, "--key", key, "--json").out)
    assert signed == {"fingerprint": xpatch.load(folder).fingerprint, "signed_by": [made["key_id"]]}
    result = run("sign", folder, "--verify", "--trusted", f"{key}.pub", "--json")
    assert result.code == 0
    assert json.loads(result.out) == {
        "fingerprint": signed["fingerprint"], "verified": True, "key_id": made["key_id"], "reason": None,
    }  # fmt: skip
    assert made["key_id"] in run("sign", folder, "--verify", "--trusted", f"{key}.pub").out


def test_a_set_nobody_trusted_has_signed(run: Callable[..., Any], folder: Path, key: Path, tmp_path: Path) -> None:
    """Exit code 1: the check failed; any of several trusted keys is enough."""
    result = run("sign", folder, "--verify", "--trusted", f"{key}.pub")
    assert result.code == 1 and "expected a signature, found none" in result.out
    run("sign", "--generate-key", tmp_path / "other")
    run("sign", folder, "--key", tmp_path / "other")
    result = run("sign", folder, "--verify", "--trusted", f"{key}.pub", "--json")
    assert result.code == 1 and json.loads(result.out)["verified"] is False
    words = ("--trusted", f"{key}.pub", "--trusted", tmp_path / "other.pub")
    assert run("sign", folder, "--verify", *words).code == 0


def test_bad_input(run: Callable[..., Any], folder: Path, key: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    public = f"{key}.pub"
    for words, told in (
        ((folder,), "expected one of --key FILE, --verify, --generate-key FILE; found none"),
        ((folder, "--key", key, "--verify", "--trusted", public), "found --key, --verify"),
        ((folder, "--verify"), "--verify and --trusted FILE go together"),
        ((folder, "--key", key, "--trusted", public), "--verify and --trusted FILE go together"),
        (("--key", key), "expected a patch folder with --key or --verify"),
        ((folder, "--generate-key", tmp_path / "n"), "none with --generate-key"),
        (("--generate-key", key), "keys are never replaced"),
        ((folder, "--key", public), "expected an ed25519 private key"),
        ((folder, "--verify", "--trusted", key), "expected a public key, found a private one"),
        ((tmp_path / "nowhere", "--key", key), "expected a patch folder, found nothing"),
        ((tmp_path / "nowhere", "--verify", "--trusted", public), "expected a patch folder, found nothing"),
    ):
        result = run("sign", *words)
        assert result.code == 2 and result.out == "" and told in result.err, (words, result)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
