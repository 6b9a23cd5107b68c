"""GRACE (Hartvigsen et al. 2023): wrong answers go into a codebook at the final FFN; rows far from all its keys keep their bits."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.ft.editor import check_plain
from xpatch.editors.ft.train import TrainableFFN
from xpatch.editors.grace.codebook import Codebook
from xpatch.editors.grace.config import PRESETS, GraceConfig
from xpatch.editors.grace.encode import encode
from xpatch.editors.grace.train import Adaptor
from xpatch.editors.rows import EditRows, Trained
from xpatch.editors.task import Outcome, Product, Task
from xpatch.models.anatomy import FFNSite
from xpatch.ops.reference import activate
from xpatch.patches.types import Gate, PatchNeurons

PART, ERASER, GROUP = "values", "eraser", "grace"


class GraceEditor:
    """Edits that share a key form a group; where values replace the FFN's output, all edits are one."""

    info = MethodInfo(
        name="grace",
        title="GRACE",
        paper="Hartvigsen et al. 2023, Aging with GRACE: Lifelong Model Editing with Discrete Key-Value Adaptors, NeurIPS",
        url="https://arxiv.org/abs/2211.11031",
        edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2, Llama-like), single texts and pairs; the edit's own language, or as "
        "train_languages says; the paper preset only FFNs of two linears, and its edits cannot be separated",
        separable=True,
    )
    presets: Mapping[str, GraceConfig] = PRESETS

    def edit(self, task: Task, config: GraceConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        if config.place == "replace":
            check_plain(task.site, "replacing its output")
        return _Run(task, config).product()


class _Run:
    """One edit call: the codebook so far and who relies on which key."""

    def __init__(self, task: Task, config: GraceConfig) -> None:
        self.task, self.config = task, config
        self.rows = EditRows(task, "grace", config, memory=config.memory_share is not None)
        self.adaptor = Adaptor(task, config)
        self.kept = self._kept()
        self.trained: dict[int, Trained] = {}

    def product(self) -> Product:
        count = len(self.task.edits)
        for number in range(count):
            begun = time.perf_counter()
            if self.rows.wrong([number], self.adaptor.logits)[0]:
                for turn in range(self.config.rounds):
                    self.take(number, turn)
                    fitted = not self.rows.wrong([number], self.adaptor.logits)[0]
                    if fitted:
                        break
                self.trained[number] = Trained(fitted, time.perf_counter() - begun)
            self.task.report("training", number + 1, count)
        wrong = self.rows.wrong(range(count), self.adaptor.logits)
        if not self.trained:
            return Product({}, [self.rows.outcome(number, found, None) for number, found in enumerate(wrong)])
        return self.finish(wrong)

    def take(self, number: int, turn: int) -> None:
        """Each text of an edit that is answered wrongly becomes a key, or joins one."""
        book, plan = self.adaptor.book, self.rows.plans[number]
        for row, label in zip(plan.rows, plan.labels, strict=True):
            index = torch.tensor([row], device=self.rows.device)
            with torch.no_grad():
                if int(self.adaptor.logits(index).argmax()) == label:
                    continue
            key, fresh = book.take(self.task.cache.x[row], label, (number, row), self.limit, self.radius)
            if fresh:
                self.adaptor.begin(key, row, self.task.generator("values", plan.edit.request.id, str(row), str(turn)))
            # A key that changed its label answers for its new users alone.
            users = [r for edit, r in book.users[key] if self._label(edit, r) == label] if self.config.replay else [row]
            self.adaptor.fit(key, torch.tensor(sorted(set(users)), device=self.rows.device))

    @property
    def radius(self) -> float:
        """The radius of a key nothing is near to, before its limit."""
        return float("inf") if len(self.kept[0]) else self.config.radius

    def limit(self, key: torch.Tensor, label: int) -> float:
        """key `[D]` -> the share of its distance to the nearest row that must keep an answer other than `label`."""
        rows, answers = self.kept
        other = rows[answers != label]
        if not len(other):
            return self.config.radius if self.config.memory_share is not None else float("inf")
        nearest = torch.linalg.vector_norm(self.task.cache.x[other] - key, dim=-1).min()
        return float(nearest) * (self.config.memory_share or 1.0)

    def finish(self, wrong: list[list[str]]) -> Product:
        """The codebook as parts and gates; each edit owns the neurons of the keys it made."""
        book, site = self.adaptor.book, self.task.site
        owned: dict[int, dict[str, list[int]]] = {}
        parts, gates = {}, {}
        for number, group in enumerate(encode(book.keys, book.radii, book.values)):
            name = f"{PART}.{number}" if number else PART
            gate = Gate("ball", group.gate_keys, group.gate_radii)
            gates[_gate_name(gate)] = gate
            parts[name] = PatchNeurons(site.name, group.keys, group.bias, group.values, "relu", gate=_gate_name(gate))
            for place, key in enumerate(group.members):
                maker = book.users[key][0][0]
                owned.setdefault(maker, {}).setdefault(name, []).extend((2 * place, 2 * place + 1))
        groups = _groups(book)
        if self.config.place == "replace":
            gate = Gate("ball", book.keys, book.radii)
            gates[_gate_name(gate)] = gate
            parts[ERASER] = _eraser(self.task, site, _gate_name(gate))
            groups = dict.fromkeys(self.trained, GROUP)
        outcomes: list[Outcome] = []
        for number, found in enumerate(wrong):
            rows = {name: tuple(sorted(some)) for name, some in owned.get(number, {}).items()}
            if ERASER in parts:
                rows[ERASER] = ()
            outcomes.append(
                self.rows.outcome(
                    number, found, self.trained.get(number), rows, groups.get(number), "a later edit changed its key"
                )
            )
        return Product(parts, outcomes, gates=gates)

    def _kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `[M]` and the answer each must keep or get `[M]`: the memory's, and the edits'."""
        device, memory = self.rows.device, self.rows.memory
        if self.config.memory_share is None:
            return memory[:0], memory[:0]
        rows = [row for plan in self.rows.plans for row in plan.rows]
        labels = [label for plan in self.rows.plans for label in plan.labels]
        answers = self.task.cache.logits[memory].argmax(-1)
        return (
            torch.cat((memory, torch.tensor(rows, dtype=torch.long, device=device))),
            torch.cat((answers, torch.tensor(labels, dtype=torch.long, device=device))),
        )

    def _label(self, number: int, row: int) -> int:
        plan = self.rows.plans[number]
        return plan.labels[plan.rows.index(row)]


def _groups(book: Codebook) -> dict[int, str]:
    """Edit number -> the name of its group, for edits that rely on keys another edit made, or others on theirs."""
    leader: dict[int, int] = {}

    def find(edit: int) -> int:
        while leader.setdefault(edit, edit) != edit:
            edit = leader[edit]
        return edit

    for users in book.users:
        first = find(users[0][0])
        for edit, _ in users:
            a, b = find(edit), first
            leader[max(a, b)] = first = min(a, b)
    members: dict[int, list[int]] = {}
    for edit in leader:
        members.setdefault(find(edit), []).append(edit)
    return {edit: f"{GROUP}-{root}" for root, some in members.items() if len(some) > 1 for edit in some}


def _eraser(task: Task, site: FFNSite, gate: str) -> PatchNeurons:
    """Neurons that take the FFN's own output away: its linears with the sign turned, and one constant neuron for its bias."""
    up, up_bias, down, down_bias = TrainableFFN(task.model, site).start
    assert up is not None and down is not None  # every linear has a weight
    keys, values = up, -down.T
    bias = torch.zeros(len(up), device=up.device) if up_bias is None else up_bias
    if down_bias is not None:
        one = activate(torch.ones(1, device=up.device), site.activation)
        keys = torch.cat((keys, torch.zeros_like(keys[:1])))
        bias = torch.cat((bias, torch.ones_like(one)))
        values = torch.cat((values, -down_bias[None] / one))
    return PatchNeurons(site.name, keys.cpu(), bias.cpu(), values.cpu(), site.activation, gate=gate)


def _gate_name(gate: Gate) -> str:
    """A name of its content, so that two sets with different codebooks can be added."""
    digest = hashlib.sha256()
    for tensor in gate.tensors.values():
        digest.update(tensor.numpy().tobytes())
    return f"{GROUP}-{digest.hexdigest()[:12]}"


register(GraceEditor())
