"""Transformer-Patcher's procedure with MPN's sampler, written plainly: what an editor costs that runs the whole model at every step.

One edit after the other (Huang et al. 2023, section 4 and appendix; Si et al. 2024, section 3.3): ask the model with the patches so far;
where any language version is answered wrong, add one neuron to the final FFN and train it for a fixed number of steps. Every step
is a forward of the whole model on the edit's texts, with the new neuron and all earlier ones in it; the base is frozen, so backward
reaches no further down than the neuron. The memory's FFN inputs are read once, as in the reference, and each finished edit's rows join
them. No edit is looked at again.

Otherwise than in the reference, and the quicker way each time: the model stays in eval mode, the batch holds each text once
(the reference repeats one text 8 times under dropout), and with the setting `coordinates="whitened"` keys are trained as the default preset
trains them, so that as few steps are enough. Random texts are left out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import xpatch
from xpatch import EditRequest

ACTIVATE: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "ffn": F.gelu, "gelu": F.gelu}
BATCH = 64


@dataclass(frozen=True)
class Made:
    """patches, which requests are right right after their own edit, and what reading the memory took, by the clock and of the processor."""

    patches: xpatch.PatchSet
    right: Sequence[bool]
    memory_seconds: float
    memory_cpu_seconds: float


class PlainEditor:
    """Edits a `BertForSequenceClassification`, which is left as it was. settings: those of a record's `hyperparameters`."""

    def __init__(self, model: Any, tokenizer: Any, settings: Mapping[str, Any], seed: int = 0) -> None:
        self._model, self._tokenizer, self._settings = model, tokenizer, settings
        self._labels: Mapping[str, int] = model.config.label2id
        self._layer = model.bert.encoder.layer[-1]
        self._act = ACTIVATE[settings["activation"]]
        self._draw = torch.Generator().manual_seed(seed)
        self._rng = random.Random(seed)
        width = model.config.hidden_size
        self._keys, self._bias, self._values = torch.zeros(0, width), torch.zeros(0), torch.zeros(0, width)
        self._mean, self._scale = torch.zeros(width), torch.eye(width)
        self._new: list[Tensor] = []
        self._x = self._z = torch.zeros(0)

    def edit(self, requests: Sequence[EditRequest], memory: Mapping[str, Sequence[str]]) -> Made:
        """Train `requests` in their order. memory: language -> texts that must keep their answers."""
        flags = [(p, p.requires_grad) for p in self._model.parameters()]
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        try:
            with self._hooks():
                begun, used = time.perf_counter(), time.process_time()
                edited = {text for request in requests for text in _texts(request, rephrases=True)}
                kept = [text for texts in memory.values() for text in texts if text not in edited]
                self._rng.shuffle(kept)
                rows = self._read(kept[: self._settings["memory_rows"]])
                if self._settings["coordinates"] == "whitened":
                    self._mean, self._scale = _whitened(rows)
                memory_seconds, memory_cpu_seconds = time.perf_counter() - begun, time.process_time() - used
                right = []
                for request in requests:
                    good, rows = self._one(request, rows)
                    right.append(good)
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
        site = f"bert.encoder.layer.{self._model.config.num_hidden_layers - 1}"
        name = "gelu" if self._settings["activation"] == "ffn" else self._settings["activation"]
        part = xpatch.PatchNeurons(site=site, keys=self._keys, bias=self._bias, values=self._values, activation=name)
        parts = {"neurons": part} if len(self._bias) else {}
        return Made(xpatch.PatchSet(parts=parts), right, memory_seconds, memory_cpu_seconds)

    def _one(self, request: EditRequest, memory: Tensor) -> tuple[bool, Tensor]:
        """One edit: whether it is right, and the memory `[M, D]` with its rows."""
        gold = self._labels[request.target or ""]
        required = self._inputs(_texts(request, rephrases=False))
        if self._right(required, gold):
            return True, memory
        inputs = self._inputs(_texts(request, rephrases=self._settings["rephrases"]))
        labels = torch.full((len(inputs["input_ids"]),), gold)
        with torch.no_grad():
            self._model(**inputs)
        x = self._x[:, 0].clone()
        seen = self._seen(x[0])
        key = seen / seen.square().sum()  # the request's own language: its pre-activation starts at 1
        value = torch.randn(len(key), generator=self._draw)
        self._new = [key, torch.zeros(()), value, torch.full_like(key, self._settings["amplify"])]
        self._train(inputs, labels, memory)
        key, bias, value, amplified = self._new
        self._new = []
        plain = self._scale @ key
        self._keys = torch.cat((self._keys, plain.unsqueeze(0)))
        self._bias = torch.cat((self._bias, (bias - plain @ self._mean).unsqueeze(0)))
        self._values = torch.cat((self._values, (value * amplified).unsqueeze(0)))
        return self._right(required, gold), torch.cat((memory, x))

    def _train(self, inputs: Mapping[str, Tensor], labels: Tensor, memory: Tensor) -> None:
        settings = self._settings
        memory = self._seen(memory)
        parameters = [tensor.requires_grad_(True) for tensor in self._new]
        adam = torch.optim.Adam(parameters, lr=settings["learning_rate"], weight_decay=settings["weight_decay"])
        last = max(settings["steps"] - 1, 1)
        for step in range(settings["steps"]):
            for group in adam.param_groups:
                group["lr"] = settings["learning_rate"] * (1 - (1 - settings["learning_rate_end"]) * step / last)
            logits = self._model(**inputs).logits
            count = settings["memory_per_step"] or len(memory)
            rows = (
                memory if count >= len(memory) else memory[torch.randint(len(memory), (count,), generator=self._draw)]
            )
            loss = self._loss(logits, labels, self._z, torch.addmv(parameters[1], rows, parameters[0]))
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings["clip"])
            adam.step()
        self._new = [parameter.detach() for parameter in parameters]

    def _loss(self, logits: Tensor, labels: Tensor, own: Tensor, memory: Tensor) -> Tensor:
        """logits `[R, C]`, labels `[R]`; pre-activations of the edit's rows, own `[R]`, and of the memory's `[M]`."""
        settings = self._settings
        log_p = F.log_softmax(logits, dim=-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        loss = F.nll_loss(log_p, labels) - settings["confidence_penalty"] * entropy
        fires = torch.exp(-own).topk(min(settings["activation_top"], len(own))).values.mean()
        loss = loss + settings["activation_weight"] * fires
        if not len(memory):
            return loss
        top, margin = settings["memory_top"], settings["memory_margin"]
        largest = memory.topk(min(top, len(memory))).values
        pairs = (largest.unsqueeze(1) - own).flatten()
        relative = torch.exp(pairs.topk(min(top, len(pairs))).values + margin).mean()
        every = largest[: -(-top // len(own))].repeat_interleave(len(own))[:top]  # each memory row stands R times
        return loss + settings["memory_weight"] * (relative + torch.exp(every + margin).mean())

    def _seen(self, x: Tensor) -> Tensor:
        """x `[..., D]` in the coordinates keys are trained in."""
        return (x - self._mean) @ self._scale

    def _right(self, inputs: Mapping[str, Tensor], gold: int) -> bool:
        with torch.no_grad():
            return bool((self._model(**inputs).logits.argmax(-1) == gold).all())

    @torch.no_grad()
    def _read(self, sentences: Sequence[str]) -> Tensor:
        """The FFN inputs `[M, D]` that the head reads, texts of like length together."""
        order = sorted(range(len(sentences)), key=lambda index: len(sentences[index]))
        found = torch.zeros(len(sentences), self._model.config.hidden_size)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            self._model(**self._inputs([sentences[index] for index in chosen]))
            found[chosen] = self._x[:, 0]
        return found

    def _inputs(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        return dict(self._tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt"))

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        def keep(module: Any, args: Any) -> None:
            self._x = args[0]

        def add(module: Any, args: Any, output: Tensor) -> Tensor:
            if len(self._bias):
                output = output + self._act(F.linear(self._x, self._keys, self._bias)) @ self._values
            if self._new:
                key, bias, value, amplified = self._new
                z = self._seen(self._x) @ key + bias
                self._z = z[:, 0]
                output = output + self._act(z).unsqueeze(-1) * (value * amplified)
            return output

        training = self._model.training
        handles = [
            self._layer.intermediate.register_forward_pre_hook(keep),
            self._layer.output.dense.register_forward_hook(add),
        ]
        self._model.eval()
        try:
            yield
        finally:
            self._model.train(training)
            for handle in handles:
                handle.remove()


def _whitened(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and symmetric scale `[D, D]` of coordinates in which `rows` `[M, D]` are whitened half way."""
    exact = rows.double()
    covariance = torch.cov(exact.T)
    variances, directions = torch.linalg.eigh(
        (covariance + covariance.diagonal().mean() * torch.eye(len(covariance))) / 2
    )
    return exact.mean(0).float(), ((directions * variances.rsqrt()) @ directions.T).float()


def _texts(request: EditRequest, rephrases: bool) -> list[str]:
    """The request's own language first; its rephrases behind all versions."""
    chosen = [request.language, *(language for language in request.versions if language != request.language)]
    found = [request.versions[language].text for language in chosen]
    if rephrases:
        found += [probe.text for language in chosen for probe in request.versions[language].rephrases]
    return found
