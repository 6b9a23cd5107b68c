"""`xpatch sign`: vouch for a patch folder with a key, check who vouched for it, or make a key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from xpatch.cli.console import print_json, stdout
from xpatch.errors import FormatError, XpatchError


def sign(
    patches: Annotated[str | None, typer.Argument(help="Patch folder (or hf:// or another fsspec URL).")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key to sign with: PEM, or 64 hex digits.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that a trusted key signed the set; exit code 1 if none did.")
    ] = False,
    trusted: Annotated[
        list[Path] | None, typer.Option(help="With --verify: a trusted public key; may be repeated.")
    ] = None,
    generate_key: Annotated[
        Path | None, typer.Option(help="Make a key pair: the private key at this file, the public one at FILE.pub.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Sign a patch set (ed25519), so that those who serve it can refuse sets that nobody they trust has signed.

    Example: xpatch sign --generate-key release.key

    Example: xpatch sign fixes --key release.key

    Example: xpatch sign fixes --verify --trusted release.key.pub
    """
    wanted = [word for word, given in (("--key", key), ("--verify", verify), ("--generate-key", generate_key)) if given]
    if len(wanted) != 1:
        raise XpatchError(
            f"sign: expected one of --key FILE, --verify, --generate-key FILE; found {', '.join(wanted) or 'none'}"
        )
    if (trusted is not None) != verify:
        raise XpatchError("sign: --verify and --trusted FILE go together; give both")
    if (patches is None) != (generate_key is not None):
        raise XpatchError("sign: expected a patch folder with --key or --verify, and none with --generate-key")
    if generate_key is not None:
        _generate(generate_key, as_json)
    elif key is not None:
        _sign(str(patches), key, as_json)
    else:
        _verify(str(patches), trusted or [], as_json)


def _generate(file: Path, as_json: bool) -> None:
    from xpatch.patches.keys import PUBLIC_SUFFIX, generate_key

    made = {"key_id": generate_key(file), "private_key": str(file), "public_key": f"{file}{PUBLIC_SUFFIX}"}
    _tell(made, f"key {made['key_id']}\nprivate: {file} (keep it secret)\npublic:  {made['public_key']}", as_json)


def _sign(patches: str, key: Path, as_json: bool) -> None:
    import xpatch

    signed = xpatch.sign(patches, key)
    found = {"fingerprint": signed.fingerprint, "signed_by": [each.key_id for each in signed.signatures]}
    _tell(found, f"signed {patches} ({signed.fingerprint[:12]}) with key {signed.signatures[-1].key_id}", as_json)


def _verify(patches: str, trusted: list[Path], as_json: bool) -> None:
    import xpatch
    from xpatch.patches.keys import public_key

    for key in trusted:  # a bad key file is bad input, not a failed check
        public_key(key)
    patch_set = xpatch.load(patches)
    found: dict[str, Any] = {"fingerprint": patch_set.fingerprint, "verified": True, "key_id": None, "reason": None}
    try:
        found["key_id"] = xpatch.verify(patch_set, trusted)
    except FormatError as error:
        found.update(verified=False, reason=str(error))
    _tell(
        found,
        found["reason"] or f"{patches} ({patch_set.fingerprint[:12]}) is signed by trusted key {found['key_id']}",
        as_json,
    )
    if not found["verified"]:
        raise typer.Exit(1)


def _tell(found: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        stdout().print(text, markup=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sign)
