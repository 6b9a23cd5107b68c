"""Which base a patch set fits: digests of the model's weights and tokenizer, and their comparison.

A digest is sha256 over the sorted names, shapes and bytes of parameters and persistent buffers, in three precisions: fp32,
fp16-rounded and bf16-rounded. A set remembers all three, so one trained on an fp32 model fits the same model served in fp16
or bf16. Needs no transformers: a model is anything with `named_parameters` and, for the descriptive fields, a Hugging Face
`config`.

Quantised models (bitsandbytes, torchao, torch's own ...) have linear layers whose weights compare with nothing. Where the set's
base or the model is quantised, the checks "layer", "head" and "all_weights" are one, "all_weights": embeddings, norms and biases,
which quantisation leaves as they are, must be the same. So a set trained on a model fits its quantised copies, and not those of
another one; a fine-tune that changed nothing but weights of linear layers is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict

from xpatch.errors import MismatchError
from xpatch.patches import digests, fits
from xpatch.patches.digests import Digests
from xpatch.patches.locks import new_lock
from xpatch.patches.weights import innermost

if TYPE_CHECKING:
    from xpatch.patches.types import PatchSet

CHECKS = ("architecture", "width", "layers", "activation", "labels", "layer", "head", "all_weights", "tokenizer")
_tokenizers: weakref.WeakKeyDictionary[Any, tuple[int, str]] = weakref.WeakKeyDictionary()
_tokenizers_lock = new_lock()
_PROBES = (
    "Paris is the capital of France.",
    "Die Größe des Flusses: 1 234,5 km!",
    "L'été, c'était à Noël. ¿Dónde está el niño?",
    "北京是中国的首都。",
    "القاهرة هي عاصمة مصر.",
    "Москва 東京 서울 दिल्ली \t UPPER lower_case",
)


class BaseIdentity(BaseModel):
    """What is recorded of a base model.

    architecture: class name; width D, layers, activation: from the config, None where it names none; id2label: of classifiers;
    dtype: the least precise floating dtype of the weights. all_weights, body (all but the head), head (parameters outside the
    base encoder, and its pooler; None without one), touched: layer name -> its digests; tokenizer: digest of its vocabulary and
    of what it makes of probe texts; unquantised: embeddings, norms and biases alone; quantisation: the method of a quantised
    model, whose other digests leave the quantised weights out, and origin: where it was loaded from (for people: paths differ
    between machines).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    width: int | None = None
    layers: int | None = None
    activation: str | None = None
    id2label: dict[int, str] | None = None
    dtype: Literal["float32", "float16", "bfloat16"]
    all_weights: Digests
    body: Digests
    head: Digests | None = None
    touched: dict[str, Digests] = {}
    tokenizer: str | None = None
    origin: str | None = None
    quantisation: str | None = None
    unquantised: Digests | None = None

    @property
    def num_labels(self) -> int | None:
        """The number of class labels, None for a model without labels."""
        return None if self.id2label is None else len(self.id2label)


def identify(model: torch.nn.Module, tokenizer: Any = None, *, site: str | Iterable[str] | None = None) -> BaseIdentity:
    """The identity of `model`; `site`: the patched module or modules, whose layers get digests of their own.

    Weights are hashed once per model and again only where they changed: cached by tensor identity, version and a sample of
    the values (a write of a few numbers through `.data` can escape both). Raises `MismatchError` for a site the model lacks
    or weights that are not in memory.
    """
    model = innermost(model)
    weights = digests.of_tensors(model)
    sites = [site] if isinstance(site, str) else list(site or ())
    head = _head_names(model, list(weights))
    touched = {}
    for name in sites:
        layer = _layer_of(model, name)
        touched[layer] = digests.combined({key: value for key, value in weights.items() if key.startswith(layer + ".")})
    config = _text_config(model)
    quantisation = digests.quantisation(model)
    return BaseIdentity(
        architecture=type(model).__name__,
        width=_number(config, "hidden_size", "d_model", "n_embd"),
        layers=_number(config, "num_hidden_layers", "num_layers", "n_layer"),
        activation=_activation(config),
        id2label=_labels(model),
        dtype=digests.weakest_dtype(model),
        all_weights=digests.combined(weights),
        body=digests.combined({key: value for key, value in weights.items() if key not in head}),
        head=digests.combined({key: weights[key] for key in head}) if head else None,
        touched=touched,
        tokenizer=None if tokenizer is None else tokenizer_digest(tokenizer),
        origin=str(getattr(config, "_name_or_path", "") or "") or None if quantisation else None,
        quantisation=quantisation,
        unquantised=digests.unquantised(model, weights),
    )


def check_fit(
    patches: PatchSet,
    model: torch.nn.Module,
    tokenizer: Any = None,
    allow: Iterable[str] = (),
    *,
    served: Iterable[PatchSet] = (),
) -> None:
    """Check that `patches` were made for `model` (and, where given, for `tokenizer`).

    allow: checks to leave out, among `CHECKS`; each relaxes itself alone. Without the head's check all other weights are still
    compared. Hand-made sets (no base) are only checked for their sites. served: sets that are on the model now; beside one for the
    same base, only the layers this set touches and the head are looked at again.
    Raises `MismatchError` naming the first difference, what was expected, what was found and what to do.
    """
    allowed = _known_checks(allow)
    for name, part in patches.parts.items():
        if not _has(model, part.site):
            raise MismatchError(
                f"part {name!r}: expected a module {part.site!r}, found none in {type(model).__name__}; "
                "the patches were made for another architecture"
            )
    if patches.base is None:
        return
    sites = [layer for layer in patches.base.touched if "layer" not in allowed or _has(model, layer)]
    labels = tuple((_labels(model) or {}).items())
    how = (frozenset(allowed), None if tokenizer is None else tokenizer_digest(tokenizer), labels)
    if fits.known(model, patches.base, how, served=any(other.base == patches.base for other in served)):
        return
    difference = first_difference(patches.base, identify(model, tokenizer, site=sites), allow=allowed)
    if difference is not None:
        raise MismatchError(f"the patches do not fit this model: {difference}")
    fits.remember(model, patches.base, how)


def first_difference(expected: BaseIdentity, found: BaseIdentity, allow: Iterable[str] = ()) -> str | None:
    """The first check that fails, as one sentence, or None. Weights are compared in the weaker of the two precisions."""
    allowed = _known_checks(allow)
    plain = {
        "architecture": (expected.architecture, found.architecture),
        "width": (expected.width, found.width),
        "layers": (expected.layers, found.layers),
        "activation": (expected.activation, found.activation),
        "labels": (expected.id2label, found.id2label),
    }
    for check, (wanted, seen) in plain.items():
        if check not in allowed and wanted is not None and wanted != seen:
            return _sentence(check, wanted, seen)
    precision = _common_precision(expected.dtype, found.dtype)
    pairs: list[tuple[str, str, Digests | None, Digests | None]] = [
        ("layer", f"weights of layer {layer}", digest, found.touched.get(layer))
        for layer, digest in expected.touched.items()
        if layer in found.touched
    ]
    pairs.append(("head", "weights of the head", expected.head, found.head))
    if "head" in allowed:
        pairs.append(("all_weights", "weights outside the head", expected.body, found.body))
    else:
        pairs.append(("all_weights", "weights", expected.all_weights, found.all_weights))
    if expected.quantisation or found.quantisation:
        pairs = [("all_weights", _beside_quantised(expected, found), expected.unquantised, found.unquantised)]
    for check, what, wanted_digests, seen_digests in pairs:
        wanted_digest, seen_digest = (getattr(each, precision, None) for each in (wanted_digests, seen_digests))
        if check not in allowed and wanted_digest != seen_digest:
            text = _sentence(check, _short(wanted_digest), _short(seen_digest), what=f"{what} in {precision}")
            mixed = {expected.dtype, found.dtype} == {"float16", "bfloat16"}
            return text + (
                "; float16 and bfloat16 weights rarely compare equal: serve in the precision of training"
                if mixed
                else ""
            )
    if (
        "tokenizer" not in allowed
        and None not in (expected.tokenizer, found.tokenizer)
        and expected.tokenizer != found.tokenizer
    ):
        return _sentence("tokenizer", _short(expected.tokenizer), _short(found.tokenizer))
    return None


def _beside_quantised(expected: BaseIdentity, found: BaseIdentity) -> str:
    sides = {"base": expected, "model": found}
    which = " and ".join(
        f"the {side} is quantised ({each.quantisation}{f', from {each.origin}' if each.origin else ''})"
        for side, each in sides.items()
        if each.quantisation
    )
    if expected.unquantised is None:
        return f"weights, which an older version of xpatch did not record in a way that can be compared ({which}),"
    return f"embeddings, norms and biases, which quantisation leaves as they are ({which}),"


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 (hex) over the vocabulary and the ids of probe texts in several scripts, single and as pairs.

    Behaviour rather than files: the same for a slow and a fast tokenizer that agree, and for all library versions.
    """
    with _tokenizers_lock:
        size = len(tokenizer)
        cached = _tokenizers.get(tokenizer)
        if cached is not None and cached[0] == size:
            return cached[1]
        digest = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items()), separators=(",", ":")).encode())
        for text in _PROBES:
            for arguments in ((text,), (text, _PROBES[0])):
                digest.update(json.dumps([int(token) for token in tokenizer(*arguments)["input_ids"]]).encode())
        _tokenizers[tokenizer] = (size, digest.hexdigest())
        return digest.hexdigest()


def _known_checks(allow: Iterable[str]) -> set[str]:
    names = {allow} if isinstance(allow, str) else set(allow)
    unknown = sorted(names.difference(CHECKS))
    if unknown:
        raise MismatchError(
            f"allow: expected checks among {', '.join(CHECKS)}, found {', '.join(map(repr, unknown))}; correct the name"
        )
    return names


def _sentence(check: str, expected: object, found: object, what: str | None = None) -> str:
    advice = {
        "labels": "give the model the labels of training",
        "tokenizer": "give the tokenizer of training",
    }.get(check, "use the model of training, or train the patches' requests again on this one")
    return f"{what or check}: expected {expected}, found {found}; {advice} (allow=({check!r},) leaves this check out)"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _common_precision(first: str, second: str) -> str:
    for dtype, precision in (("bfloat16", "bf16"), ("float16", "fp16")):
        if dtype in (first, second):
            return precision
    return "fp32"


def _has(model: torch.nn.Module, name: str) -> bool:
    try:
        innermost(model).get_submodule(name)
    except AttributeError:
        return False
    return True


def _layer_of(model: torch.nn.Module, site: str) -> str:
    """ "bert.encoder.layer.3.output.dense" -> "bert.encoder.layer.3": the layer that holds the site, else the site."""
    if not _has(model, site):
        raise MismatchError(
            f"site: expected a module {site!r}, found none in {type(model).__name__}; see model.named_modules()"
        )
    parts = site.split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts) - 1)
    return ".".join(parts[: numbered + 1])


def _head_names(model: torch.nn.Module, names: list[str]) -> set[str]:
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not _has(model, prefix):
        return set()
    return {name for name in names if not name.startswith(f"{prefix}.") or name.startswith(f"{prefix}.pooler.")}


def _text_config(model: torch.nn.Module) -> Any:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _number(config: Any, *names: str) -> int | None:
    return next(
        (int(value) for value in (getattr(config, name, None) for name in names) if isinstance(value, int)), None
    )


def _activation(config: Any) -> str | None:
    values = (
        getattr(config, name, None)
        for name in ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
    )
    return next((value for value in values if isinstance(value, str)), None)


def _labels(model: torch.nn.Module) -> dict[int, str] | None:
    labels = getattr(getattr(model, "config", None), "id2label", None)
    if not labels or "Classification" not in type(model).__name__:  # other models carry two placeholder labels
        return None
    return {int(index): str(label) for index, label in sorted(labels.items(), key=lambda item: int(item[0]))}
