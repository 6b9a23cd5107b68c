"""Transformer-Patcher as a procedure over many edits: find those needed, train a chunk side by side, check again, repair.

The papers edit one by one: edit i meets the patches of the edits before it. Here a chunk is trained against the patches there are,
installed, and then every edit so far is checked in the presence of all others; those not right are trained again with the
others' contribution in their base output.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from xpatch.editors.base import MethodInfo, register
from xpatch.editors.t_patcher.config import PRESETS, NeuronConfig
from xpatch.editors.t_patcher.coordinates import Coordinates
from xpatch.editors.t_patcher.mates import mates
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.t_patcher.samplers import Sampler, own_language
from xpatch.editors.t_patcher.standing import Standing
from xpatch.editors.t_patcher.train import Problem, train
from xpatch.editors.task import Edit, Outcome, Product, Task, Wording
from xpatch.errors import MismatchError
from xpatch.patches.types import ACTIVATIONS, PatchNeurons

PART = "neurons"
_TRIES = 4  # an edit that repairs do not help waits after so many chunks: contradictions would be trained beside every chunk to come
_SCALED_ROWS = 32768  # of the edits' rows, so many are enough for a mean and a deviation


@dataclass(frozen=True)
class _Plan:
    """One edit's cached rows: `rows[i]` must become `labels[i]`; the first `required` of them decide."""

    edit: Edit
    chosen: tuple[Wording, ...]
    rows: tuple[int, ...]
    labels: tuple[int, ...]
    required: int
    negatives: tuple[int, ...]


class PatchNeuronEditor:
    """The editor of `t-patcher`, `mpn-only` and `mpn`: they differ in `sampler` and presets alone."""

    def __init__(self, info: MethodInfo, presets: Mapping[str, NeuronConfig], sampler: Sampler) -> None:
        self.info, self.presets, self._sampler = info, presets, sampler

    def edit(self, task: Task, config: NeuronConfig) -> Product:
        """Train on `task`; every tensor of the result is on the CPU."""
        return _Run(task, config, self.info.name, self._sampler).product()


class _Run:
    """One edit call: the neurons so far, which edits have been accepted, and the current answers."""

    def __init__(self, task: Task, config: NeuronConfig, method: str, sampler: Sampler) -> None:
        self.task, self.config = task, config
        self.activation = _activation(task, config)
        self.plans = [self._plan(edit, sampler, method) for edit in task.edits]
        memory = self._memory_rows()
        task.cache.fill(task.report)
        self.device = task.cache.x.device
        split = round(len(memory) * config.memory_validation) if config.early_stop else 0
        rows = torch.tensor(memory, dtype=torch.long, device=self.device)
        self.held, self.memory = task.cache.x[rows[:split]], task.cache.x[rows[split:]]
        self.neurons = Neurons.none(task.cache.x.shape[1], self.activation, self.device)
        self.accepted: list[int] = []  # edits with neurons, in the order they were taken up
        self.spared: list[int] = []  # edits that needed none
        self.seconds = dict.fromkeys(range(len(self.plans)), 0.0)
        self.once_right: set[int] = set()
        self.tried: collections.Counter[int] = collections.Counter()  # repairs of an edit since it was right last
        asked = [tuple(zip(plan.rows[: plan.required], plan.labels, strict=False)) for plan in self.plans]
        self.standing = Standing(task.cache, task.head.tail, self.neurons, asked)

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
            self.task.report("training", decided, len(self.plans))
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
        for start in range(0, len(chunk), self.config.chunk):
            self.learn(chunk[start : start + self.config.chunk], self.config.neurons, 0, decided)
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
            for start in range(0, len(wrong), self.config.chunk):
                self.learn(wrong[start : start + self.config.chunk], neurons, turn, decided)
        self.right(self.accepted)

    def rescue(self, decided: int) -> None:
        """Edits that are still not right: train them in scaled coordinates, where rows are far longer or shorter than usual."""
        for turn in range(self.config.rounds + 1, 2 * self.config.rounds + 1):
            right = self.right(self.accepted)
            wrong = [edit for edit in self.accepted if not right[edit]]
            if not wrong:
                return
            rows = self._tensor(sorted({row for plan in self.plans for row in plan.rows}))
            scaled = Coordinates.scaled(
                torch.cat((self.memory, self.task.cache.x[rows[:: len(rows) // _SCALED_ROWS + 1]]))
            )
            self.neurons.drop(torch.tensor(wrong, device=self.device))
            for start in range(0, len(wrong), self.config.chunk):
                self.learn(wrong[start : start + self.config.chunk], self.config.max_neurons, turn, decided, scaled)

    def learn(
        self, edits: list[int], neurons: int, turn: int, decided: int, coordinates: Coordinates | None = None
    ) -> None:
        """Train `edits` side by side against the current neurons and install the result."""
        begun = time.perf_counter()
        problem = self.problem(edits, neurons, turn, coordinates)
        generator = self.task.generator("memory", *(self.plans[edit].edit.request.id for edit in edits), str(turn))

        def tick(share: float) -> None:
            if not turn:
                self.task.report("training", decided + int(share * len(edits)), len(self.plans))

        keys, bias, values = train(problem, self.config, self.task.head.tail, self.activation, generator, tick)
        if coordinates is not None:
            keys, bias = coordinates.fold(keys, bias)
        self.neurons.add(torch.tensor(edits, device=self.device), keys, bias, values)
        for edit in edits:
            self.seconds[edit] += (time.perf_counter() - begun) / len(edits)

    def right(self, edits: list[int]) -> dict[int, bool]:
        """Which edits are right in all their required rows, with all neurons there are."""
        found = self.standing.right().tolist()
        self.once_right.update(edit for edit in edits if found[edit])
        return {edit: found[edit] for edit in edits}

    def problem(self, edits: list[int], neurons: int, turn: int, coordinates: Coordinates | None = None) -> Problem:
        """Gather the cached rows of `edits`, in `coordinates`; base outputs hold what the current neurons add."""
        cache, plans = self.task.cache, [self.plans[edit] for edit in edits]
        width = max(len(plan.rows) for plan in plans)
        index = self._tensor([[plan.rows[i % len(plan.rows)] for i in range(width)] for plan in plans])
        labels = self._tensor([[plan.labels[i % len(plan.rows)] for i in range(width)] for plan in plans])
        required = self._tensor([[i < plan.required for i in range(width)] for plan in plans])
        seen = coordinates.forward if coordinates is not None else lambda x: x
        plain = cache.x[index]
        x = seen(plain)
        shared = torch.zeros(len(cache.x), dtype=torch.bool, device=self.device)
        shared[self._tensor([row for edit in self.accepted for row in self.plans[edit].rows])] = True
        others = mates(
            shared, [p.rows for p in plans], [p.negatives for p in plans], cache.x, self.config.mates_per_step
        )
        first = x[:, [number % width for number in range(neurons)]]
        values = torch.stack([self._noise(plan, neurons, turn, x.shape[-1]) for plan in plans]).to(x)
        return Problem(
            x=x,
            residual=cache.residual[index],
            base=cache.base[index] + self.neurons.output(plain.flatten(0, 1)).view_as(plain),
            labels=labels,
            required=required,
            memory=seen(self.memory),
            held=seen(self.held),
            mates=seen(cache.x[others.rows]),
            foreign=others.foreign,
            crowd=seen(cache.x[self._shuffled(others.crowd, plans, turn)]),
            # The pre-activation starts at exactly 1 on the row it is made from (Transformer-Patcher, appendix).
            keys=first / first.square().sum(-1, keepdim=True),
            bias=x.new_zeros(len(plans), neurons),
            values=values,
        )

    def statuses(self) -> dict[int, str]:
        """What has become of each edit, with the neurons there are."""
        right = self.standing.right().tolist()
        found = {edit: "already-right" if right[edit] else "lost" for edit in self.spared}
        for edit in self.accepted:
            found[edit] = "edited" if right[edit] else "lost" if edit in self.once_right else "failed"
        return found

    def wrong_languages(self, edit: int) -> list[str]:
        """Languages whose required text gets another answer than asked for."""
        return [self.plans[edit].chosen[number].language for number in self.standing.wrong(edit)]

    def finish(self) -> Product:
        """Statuses, messages and the final neurons, ordered by edit."""
        self.standing.refresh()
        status = self.statuses()
        failed = [edit for edit in self.accepted if status[edit] == "failed"]
        if failed and not self.config.keep_failed:  # what leaned on their neurons may fall with them
            self.neurons.drop(self._tensor(failed))
            self.standing.refresh()
            status = self.statuses()
            status.update({edit: "already-right" if status[edit] == "edited" else "failed" for edit in failed})
        wrong = {edit: self.wrong_languages(edit) for edit, found in status.items() if found in ("lost", "failed")}
        self.neurons.sort()
        rows: dict[int, list[int]] = {}
        for row, owner in enumerate(self.neurons.owner.tolist()):
            rows.setdefault(owner, []).append(row)
        outcomes = [
            Outcome(
                status=status[edit],  # type: ignore[arg-type]
                message=self._message(edit, status[edit], wrong.get(edit, [])),
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

    def _message(self, edit: int, status: str, wrong: list[str]) -> str:
        plan = self.plans[edit]
        languages = ", ".join(wording.language for wording in plan.chosen)
        cut = " (text cut at the model's length limit)" if any(row in self.task.cache.cut for row in plan.rows) else ""
        said = {
            "already-right": f"right in {languages} "
            + ("before editing" if edit in self.spared else "without neurons of its own"),
            "edited": f"right in {languages}",
            "lost": f"was right, but not beside the other edits: wrong in {', '.join(wrong)}",
            "failed": f"still wrong in {', '.join(wrong)}",
        }
        return said[status] + cut

    def _plan(self, edit: Edit, sampler: Sampler, method: str) -> _Plan:
        chosen = sampler(edit, self.task.rng(method, "languages", edit.request.id))
        languages = {wording.language for wording in chosen}
        extra = [w for w in edit.rephrases if w.language in languages] if self.config.rephrases else []
        wordings = [*chosen, *extra]
        rows = self.task.cache.want(wording.probe for wording in wordings)
        labels = tuple(wording.label for wording in wordings)
        return _Plan(edit, chosen, tuple(rows), labels, len(chosen), tuple(self.task.cache.want(edit.negatives)))

    def _memory_rows(self) -> list[int]:
        languages = {plan.edit.versions[0].language for plan in self.plans}
        own = self.config.memory_languages == "own" and any(language in languages for language in self.task.memory)
        probes = [p for language, texts in self.task.memory.items() if not own or language in languages for p in texts]
        self.task.rng("memory").shuffle(probes)
        edited = {row for plan in self.plans for row in plan.rows}
        known = {
            (p.text, p.text_pair)
            for plan in self.plans
            for w in (*plan.edit.versions, *plan.edit.rephrases)
            for p in [w.probe]
        }
        kept = [p for p in probes if (p.text, p.text_pair) not in known][: self.config.memory_rows]
        return [row for row in dict.fromkeys(self.task.cache.want(kept)) if row not in edited]

    def _noise(self, plan: _Plan, neurons: int, turn: int, width: int) -> torch.Tensor:
        return torch.randn(neurons, width, generator=self.task.generator("values", plan.edit.request.id, str(turn)))

    def _shuffled(self, rows: torch.Tensor, plans: list[_Plan], turn: int) -> torch.Tensor:
        generator = self.task.generator("crowd", plans[0].edit.request.id, str(turn))
        return rows[torch.randperm(len(rows), generator=generator).to(rows.device)]

    def _tensor(self, values: object) -> torch.Tensor:
        made = torch.tensor(values, device=self.device)
        return made if made.numel() else made.long()


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
            edits="sequence classifiers (BERT, XLM-R, DistilBERT, GPT-2), single texts and pairs; the edit's own language",
            separable=True,
        ),
        PRESETS,
        own_language,
    )
)
