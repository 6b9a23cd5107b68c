"""Transformer-Patcher as a procedure over many edits: find those needed, train a chunk side by side, check again, repair.

The papers edit one by one: edit i meets the patches of the edits before it. Here a chunk is trained against the patches there are,
installed, and then every edit so far is checked in the presence of all others; those not right are trained again with the
others' contribution in their base output.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.heard import SAYS, unsaid
from xpatch.editors.rows import LOGITS
from xpatch.editors.samplers import Sampler, own_language
from xpatch.editors.subject import SubjectKind
from xpatch.editors.t_patcher.config import LM_PRESETS, PRESETS, NeuronConfig
from xpatch.editors.t_patcher.coordinates import Coordinates
from xpatch.editors.t_patcher.plans import slots_of
from xpatch.editors.t_patcher.rows import EditRows
from xpatch.editors.t_patcher.train import train
from xpatch.editors.task import Outcome, Product, Task
from xpatch.errors import MismatchError
from xpatch.patches.types import ACTIVATIONS, EditStatus, PatchNeurons

PART = "neurons"
_TRIES = 4  # an edit that repairs do not help waits after so many chunks: contradictions would be trained beside every chunk to come
_RESCUE_STEPS = 240  # what is left over is hard: the default's 60 steps are too few for it
EDITS = (
    "sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; language models: encoder-decoders (BART, mBART, T5, "
    "mT5), decoders (GPT-2, BLOOM, Llama, Qwen ...) and masked ones; "
)
MODELS: tuple[SubjectKind, ...] = ("classifier", "causal", "seq2seq", "masked")


class PatchNeuronEditor:
    """The editor of `t-patcher`, `mpn-only` and `mpn`: they differ in `sampler` and presets alone."""

    def __init__(
        self,
        info: MethodInfo,
        presets: Mapping[str, NeuronConfig],
        sampler: Sampler,
        lm_presets: Mapping[str, NeuronConfig] | None = None,
    ) -> None:
        self.info, self.presets, self._sampler = info, presets, sampler
        self.lm_presets = lm_presets or {}

    def edit(self, task: Task, config: NeuronConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        return _Run(task, config, self.info.name, self._sampler).product()


class _Run(EditRows):
    """One edit call: the neurons so far, which edits have been accepted, and the current answers."""

    def __init__(self, task: Task, config: NeuronConfig, method: str, sampler: Sampler) -> None:
        super().__init__(task, config, _activation(task, config), method, sampler)
        self.spared: list[int] = []  # edits that needed none
        self.seconds = dict.fromkeys(range(len(self.plans)), 0.0)
        self.once_right: set[int] = set()
        self.tried: collections.Counter[int] = (
            collections.Counter()
        )  # rounds of repair an edit has had, beside all chunks
        self.stage = "training"  # "resuming" while chunks come from an interrupted call
        self.forgotten: set[int] = set()  # edits that failed and whose neurons are dropped
        self.unsaid: dict[int, str] = {}  # a language model's edits: what decoding said instead of the target

    def product(self) -> Product:
        queue, decided = list(range(len(self.plans))), 0
        while queue:
            chunk: list[int] = []
            while queue and len(chunk) < self.config.chunk:
                candidates, queue = queue[: self.config.chunk - len(chunk)], queue[self.config.chunk - len(chunk) :]
                right = self.right(candidates)
                chunk += [edit for edit in candidates if not right[edit]]
                self.spared += [edit for edit in candidates if right[edit]]
            self.take(chunk, decided)
            decided = len(self.spared) + len(self.accepted)
            self.task.report(self.stage, decided, len(self.plans))
        for _ in range(self.config.rounds):  # requests that were right until a patch of another disturbed them
            right = self.right(self.spared)
            broken = [edit for edit in self.spared if not right[edit]]
            if not broken:
                break
            self.spared = [edit for edit in self.spared if right[edit]]
            self.take(broken, decided)
        if self.config.rescue:
            self.rescue(len(self.plans))
        return self.finish()

    def take(self, chunk: list[int], decided: int) -> None:
        """Edit `chunk`: its edits are right afterwards beside all others, or have been tried often enough."""
        self.accepted += chunk
        self.learn_all(chunk, self.config.neurons, 0, decided)
        if chunk:
            self.repair(decided + len(chunk))

    def repair(self, decided: int) -> None:
        """Train again what is not right in the presence of the others; with one neuron more per round, up to `max_neurons`."""
        for turn in range(1, self.config.rounds + 1):
            right = self.right(self.accepted)
            wrong = [
                edit for edit in self.accepted if not right[edit] and self.tried[edit] < _TRIES * self.config.rounds
            ]
            if not wrong:
                return
            self.tried.update(wrong)
            neurons = max(self.config.neurons, min(self.config.neurons + turn, self.config.max_neurons))
            self.neurons.drop(torch.tensor(wrong, device=self.device))
            self.learn_all(wrong, neurons, turn, decided)
        self.right(self.accepted)

    def rescue(self, decided: int) -> None:
        """Edits that are still not right: train them in scaled coordinates, where rows are far longer or shorter than usual."""
        for turn in range(self.config.rounds + 1, 2 * self.config.rounds + 1):
            right = self.right(self.accepted)
            wrong = [edit for edit in self.accepted if not right[edit]]
            if not wrong:
                return
            scaled = Coordinates.scaled(self.typical())
            self.neurons.drop(torch.tensor(wrong, device=self.device))
            self.learn_all(wrong, self.config.max_neurons, turn, decided, scaled)

    def learn_all(
        self, edits: list[int], neurons: int, turn: int, decided: int, coordinates: Coordinates | None = None
    ) -> None:
        """`learn` in chunks; edits of a language model with `neurons` for each of their slots, those with equally many together."""
        sizes: dict[int, list[int]] = {}
        for edit in edits if self.task.decoding is not None else ():
            self.slots[edit] = slots_of(self.plans[edit], self.standing.answers(edit), self.config.max_tokens)
        for edit in edits:
            count = len(self.slots[edit].anchors) if edit in self.slots else 1
            sizes.setdefault(neurons * count, []).append(edit)
        for size, alike in sizes.items():
            rows = max(len(self.plans[edit].rows) for edit in alike)
            step = min(self.config.chunk, max(1, LOGITS // (rows * self.width)))
            for start in range(0, len(alike), step):
                self.learn(alike[start : start + step], size, turn, decided, coordinates)

    def learn(
        self, edits: list[int], neurons: int, turn: int, decided: int, coordinates: Coordinates | None = None
    ) -> None:
        """Train `edits`, with `neurons` each, side by side against the current neurons and install the result."""
        ids = [self.plans[edit].edit.request.id for edit in edits]
        key = {"edits": ids, "neurons": neurons, "turn": turn, "scaled": coordinates is not None}

        def make() -> dict[str, torch.Tensor]:
            return self.trained(edits, neurons, turn, decided, coordinates)

        step = self.task.journal.once(key, make)
        self.stage = "resuming" if step.kept else "training"
        keys, bias, values = (step.tensors[name].to(self.device) for name in ("keys", "bias", "values"))
        self.neurons.add(torch.tensor(edits, device=self.device), keys, bias, values)
        for edit in edits:
            self.seconds[edit] += step.seconds / len(edits)

    def trained(
        self, edits: list[int], neurons: int, turn: int, decided: int, coordinates: Coordinates | None
    ) -> dict[str, torch.Tensor]:
        """keys `[E, P, D]`, bias `[E, P]`, values `[E, P, D]` of `edits`, for plain rows."""
        problem = self.problem(edits, neurons, turn, coordinates)
        generator = self.task.generator("memory", *(self.plans[edit].edit.request.id for edit in edits), str(turn))

        def tick(share: float) -> None:
            if not turn:
                self.task.report("training", decided + int(share * len(edits)), len(self.plans))

        config = self.config
        if coordinates is not None:
            steps = max(config.steps, min(4 * config.steps, _RESCUE_STEPS))
            config = config.model_copy(update={"steps": steps})
        keys, bias, values = train(problem, config, self.task.head.tail, self.activation, generator, tick)
        used = coordinates or self.coordinates
        if used is not None:
            keys, bias = used.fold(keys, bias)
        return {"keys": keys, "bias": bias, "values": values}

    def right(self, edits: list[int]) -> dict[int, bool]:
        """Which edits are right in all their required rows, with all neurons there are."""
        found = self.standing.right().tolist()
        self.once_right.update(edit for edit in edits if found[edit])
        return {edit: found[edit] for edit in edits}

    def finish(self) -> Product:
        """Statuses, messages and the final neurons, ordered by edit."""
        status = self.settle()
        self.neurons.sort()
        rows: dict[int, list[int]] = {}
        for row, owner in enumerate(self.neurons.owner.tolist()):
            rows.setdefault(owner, []).append(row)
        outcomes = [
            Outcome(
                status=status[edit],
                message=self._message(edit, status[edit]),
                rows={PART: tuple(rows[edit])} if edit in rows else {},
                seconds=self.seconds[edit],
            )
            for edit in range(len(self.plans))
        ]
        part = PatchNeurons(
            site=self.task.site.name,
            keys=self.neurons.keys.cpu().contiguous(),
            bias=self.neurons.bias.cpu().contiguous(),
            values=self.neurons.values.cpu().contiguous(),
            activation=self.activation,
        )
        return Product({PART: part} if len(part.bias) else {}, outcomes)

    def settle(self) -> dict[int, EditStatus]:
        """What has become of each edit, once the neurons of failed ones are dropped (unless those are kept).

        What leaned on their neurons may fall with them, so all are asked again.
        """
        while True:
            self.standing.refresh()
            status = self.statuses()
            found = self._unsaid([edit for edit in status if status[edit] in ("edited", "already-right")])
            self.unsaid.update(found)
            status.update(dict.fromkeys(found, "failed"))
            failed = [edit for edit in self.accepted if status[edit] == "failed" and edit not in self.forgotten]
            if self.config.keep_failed or not failed:
                return status
            self.neurons.drop(self.tensor(failed))
            self.forgotten.update(failed)

    def statuses(self) -> dict[int, EditStatus]:
        """What has become of each edit by its rows, with the neurons there are."""
        right = self.right(self.accepted + self.spared)
        status: dict[int, EditStatus] = {edit: "already-right" if right[edit] else "lost" for edit in self.spared}
        for edit in self.accepted:
            if edit in self.forgotten:
                status[edit] = "already-right" if right[edit] else "failed"
            else:
                status[edit] = "edited" if right[edit] else "lost" if edit in self.once_right else "failed"
        return status

    def _unsaid(self, edits: list[int]) -> dict[int, str]:
        """Edits of a language model whose target greedy decoding, with all neurons there are, does not say, and what it says."""
        asked = [(edit, wording) for edit in edits for wording in self.plans[edit].chosen]
        return unsaid(self.task.decoding, asked, self.neurons.output)

    def _message(self, edit: int, status: EditStatus) -> str:
        plan = self.plans[edit]
        good = f"right in {', '.join(wording.language for wording in plan.chosen)}"
        heard = SAYS if self.task.decoding is not None else ""
        cut = " (text cut at the model's length limit)" if any(row in self.task.cache.cut for row in plan.rows) else ""
        if status == "edited":
            return good + heard + cut
        if status == "already-right":
            return good + (" without neurons of its own" if edit in self.forgotten else " before editing") + heard + cut
        if status == "failed" and edit in self.unsaid:
            return self.unsaid[edit] + cut
        wrong = f"wrong in {', '.join(plan.wrong_languages(self.standing.answers(edit)))}"
        return ("was right, but not beside the other edits: " if status == "lost" else "still ") + wrong + cut


def _activation(task: Task, config: NeuronConfig) -> str:
    name = task.site.activation if config.activation == "ffn" else config.activation
    if name not in ACTIVATIONS:
        raise MismatchError(
            f"FFN {task.site.name!r} has the activation {name!r}, which a patch cannot share; known: {', '.join(ACTIVATIONS)}; "
            "choose the gate yourself with activation='relu'"
        )
    return name


register(
    PatchNeuronEditor(
        MethodInfo(
            name="t-patcher",
            title="Transformer-Patcher",
            paper="Huang et al. 2023, Transformer-Patcher: One Mistake Worth One Neuron, ICLR",
            url="https://arxiv.org/abs/2301.09785",
            edits=EDITS + "the edit's own language",
            separable=True,
            models=MODELS,
            resumes=True,
        ),
        PRESETS,
        own_language,
        LM_PRESETS,
    )
)
