"""What the soak runs: two small models of real classes, the patch sets that come and go, and the questions asked of them.

Set names and their sets: "a" holds A or nothing, "b" holds B, B' or nothing, so a model has six states. Every set joins at
several sites, so that an output in which two states meet differs from the output of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

import xpatch

State = tuple[str | None, ...]  #: what each name holds, in the order of `Subject.sets`
Answer = bytes  #: every number of an output; `REFUSED` where the call was refused

REFUSED = b"refused"
WIDTH, INNER, LAYERS, VOCABULARY = 32, 64, 4, 100
_BATCH, _TOKENS, _NEW_TOKENS = 4, 7, 4


@dataclass(frozen=True)
class Question:
    """One call of a model. patched: whether its answer depends on what is applied. of: the set its rows name.

    A call whose rows name a set that is not applied is refused; but where no set at all is applied nothing reads the rows, unless
    the end of a removal still waits for running calls, so either happens.
    """

    name: str
    ask: Callable[[], Answer]
    patched: bool = True
    of: str | None = None


@dataclass(frozen=True)
class Subject:
    """One model under test. sets: set name -> label -> patch set; label None, always possible, is "not applied"."""

    name: str
    model: Any
    sets: Mapping[str, Mapping[str, xpatch.PatchSet]]
    questions: tuple[Question, ...]

    @property
    def states(self) -> list[State]:
        """Every combination of what the names can hold, nothing at all first."""
        return list(product(*((None, *labels) for labels in self.sets.values())))

    def put(self, name: str, label: str | None, before: str | None) -> None:
        """Make `name` hold `label`, where it held `before`."""
        if label is not None:
            xpatch.apply(self.model, self.sets[name][label], name=name)
        elif before is not None:
            xpatch.remove(self.model, name)


def encoder(seed: int) -> Subject:
    """A BERT classifier of random weights; all its answers are logits."""
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=INNER,
    )  # fmt: skip
    model, draw = _made(hf.BertForSequenceClassification, config, seed)
    batch = _batch(draw)

    def call(rows: xpatch.Rows | None = None, within: AbstractContextManager[Any] | None = None) -> Answer:
        with within or nullcontext():
            return _answer(model, lambda more: (model(**batch, **more).logits,), rows)

    def gradients() -> Answer:
        # Of the embeddings: those of the weights would be shared by all threads.
        inputs = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        logits = model(inputs_embeds=inputs, attention_mask=batch["attention_mask"]).logits
        return _bytes(logits.detach(), *torch.autograd.grad(logits.square().sum(), inputs))

    questions = (
        Question("plain", call),
        Question("rows", lambda: call(_some_rows())),
        Question("named rows", lambda: call(_named_rows()), of="a"),
        Question("rows in context", lambda: call(within=xpatch.rows(patches=["__base__", None] * 2))),
        Question("gradients", gradients),
        Question("disabled", lambda: call(within=xpatch.disabled(model)), patched=False),
    )
    layers = [f"bert.encoder.layer.{i}" for i in range(LAYERS)]
    return Subject("encoder", model, _sets(layers, ".output.dense", draw), questions)


def decoder(seed: int) -> Subject:
    """A GPT-2 of random weights; its answers are logits, and what it generates with the scores of every step."""
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=INNER, bos_token_id=None, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model, draw = _made(hf.GPT2LMHeadModel, config, seed)
    batch = _batch(draw)
    options = {"max_new_tokens": _NEW_TOKENS, "return_dict_in_generate": True, "output_scores": True}

    def call(rows: xpatch.Rows | None = None) -> Answer:
        return _answer(model, lambda more: (model(**batch, **more).logits,), rows)

    def generate(beams: int, rows: xpatch.Rows | None = None) -> Answer:
        def tensors(more: dict[str, Any]) -> tuple[torch.Tensor, ...]:
            found = model.generate(**batch, **options, **more, num_beams=beams)
            return (found.sequences, *found.scores)

        return _answer(model, tensors, rows)

    questions = (
        Question("plain", call),
        Question("rows", lambda: call(_some_rows())),
        Question("greedy", lambda: generate(1)),
        Question("greedy, rows", lambda: generate(1, _some_rows())),
        Question("beams", lambda: generate(2)),
        Question("beams, rows", lambda: generate(2, _some_rows())),
        Question("beams, named", lambda: generate(2, xpatch.Rows(patches="a")), of="a"),
    )
    layers = [f"transformer.h.{i}.mlp" for i in range(LAYERS)]
    return Subject("decoder", model, _sets(layers, ".c_proj", draw), questions)


def _sets(layers: list[str], down: str, draw: torch.Generator) -> dict[str, dict[str, xpatch.PatchSet]]:
    # No linear layer has neurons from one set and a delta from another: their sum would depend on who came first.
    def neurons(layer: int) -> xpatch.PatchNeurons:
        keys, values = _random(draw, 5, WIDTH), _random(draw, 5, WIDTH)
        return xpatch.PatchNeurons(layers[layer], keys, _random(draw, 5), values, "relu")

    def delta(layer: int) -> xpatch.LowRankDelta:
        return xpatch.LowRankDelta(layers[layer] + down, _random(draw, 3, INNER), _random(draw, WIDTH, 3))

    def made(first: int, second: int, third: int) -> xpatch.PatchSet:
        return xpatch.PatchSet(
            parts={"0": neurons(first), "1": neurons(second), "2": neurons(third), "3": delta(LAYERS - 1)}
        )

    other = xpatch.PatchSet(parts={"0": neurons(0), "1": neurons(2)})  # B' has other sites than B: hooks come and go
    return {"a": {"A": made(0, 1, 2)}, "b": {"B": made(2, 0, 1), "B'": other}}


def _answer(
    model: Any, tensors: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]], rows: xpatch.Rows | None
) -> Answer:
    """The bytes of what `tensors(keyword arguments)` returns for `model`."""
    try:
        with torch.no_grad():
            try:
                found = tensors({} if rows is None else {"xpatch": rows})
            except (TypeError, ValueError) as error:
                if rows is None or "xpatch" not in str(error):
                    raise
                with xpatch.disabled(model):  # no set was applied, so nothing took the argument; one may be by now
                    found = tensors({})
    except xpatch.MismatchError:  # the rows name a set that is not applied
        return REFUSED
    return _bytes(*found)


def _bytes(*tensors: torch.Tensor) -> Answer:
    return b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)


def _some_rows() -> xpatch.Rows:
    return xpatch.Rows(patches=[None, "__base__"] * (_BATCH // 2))


def _named_rows() -> xpatch.Rows:
    return xpatch.Rows(patches=["a", "__base__", ["a"], None])


def _made(cls: Any, config: Any, seed: int) -> tuple[Any, torch.Generator]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config).eval()
    return model, torch.Generator().manual_seed(seed)


def _batch(draw: torch.Generator) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, VOCABULARY - 1, (_BATCH, _TOKENS), generator=draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _random(draw: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw)
