"""The rows of one edit call: what each edit is trained on, what must stay, what is answered now, and the problem of a chunk."""

from __future__ import annotations

import torch

from xpatch.editors.rows import LOGITS, memory_rows
from xpatch.editors.samplers import Sampler
from xpatch.editors.t_patcher.config import NeuronConfig
from xpatch.editors.t_patcher.coordinates import Coordinates
from xpatch.editors.t_patcher.mates import mates
from xpatch.editors.t_patcher.neurons import Neurons
from xpatch.editors.t_patcher.noise import noise
from xpatch.editors.t_patcher.plans import Plan, Slots
from xpatch.editors.t_patcher.standing import Standing
from xpatch.editors.t_patcher.train import Problem
from xpatch.editors.task import Edit, Task

_TYPICAL = 32768  # of the edits' rows, so many are enough for a mean and a covariance


class EditRows:
    """Plans and memory as rows of the cache, the neurons so far, and what is answered with them."""

    def __init__(self, task: Task, config: NeuronConfig, activation: str, method: str, sampler: Sampler) -> None:
        self.task, self.config, self.activation = task, config, activation
        self.plans = [self._plan(edit, sampler, method) for edit in task.edits]
        memory, far = self._memory_rows(), self._random_rows()
        task.cache.fill(task.report)
        self.device = task.cache.x.device
        split = round(len(memory) * config.memory_validation) if config.early_stop else 0
        rows = torch.tensor(memory, dtype=torch.long, device=self.device)
        self.width = task.head.vocabulary if task.decoding is not None else task.head.labels
        held, kept = rows[:split], rows[split:]
        if task.decoding is not None:  # the tokens of one text lie together, and what a step draws follows each other
            kept = self._shuffled(kept, "memory", "tokens")
        self.held, self.memory = task.cache.x[held], task.cache.x[kept]
        self.everything = self.memory  # and random texts
        if far:
            both = torch.cat((kept, torch.tensor(far, device=self.device)))
            self.everything = task.cache.x[self._shuffled(both.unique(), "memory", "noise")]
        self.coordinates = self._coordinates()
        self.neurons = Neurons.none(task.cache.x.shape[1], self.activation, self.device)
        self.accepted: list[int] = []  # edits with neurons, in the order they were taken up
        self.slots: dict[int, Slots] = {}  # of a language model's edits
        asked = [tuple(zip(plan.rows[: plan.required], plan.labels, strict=False)) for plan in self.plans]
        self.standing = Standing(task.cache, task.head.tail, self.neurons, asked, max(1, LOGITS // self.width))

    def problem(self, edits: list[int], neurons: int, turn: int, coordinates: Coordinates | None = None) -> Problem:
        """Gather the cached rows of `edits`, in `coordinates`, by default the run's; base outputs hold what the current neurons add."""
        cache, plans = self.task.cache, [self.plans[edit] for edit in edits]
        width = max(len(plan.rows) for plan in plans)
        index = self.tensor([[plan.rows[i % len(plan.rows)] for i in range(width)] for plan in plans])
        labels = self.tensor([[plan.labels[i % len(plan.rows)] for i in range(width)] for plan in plans])
        required = self.tensor([[i < plan.required for i in range(width)] for plan in plans])
        used = coordinates or self.coordinates
        seen = used.forward if used is not None else lambda x: x
        plain = cache.x[index]
        x = seen(plain)
        shared = torch.zeros(len(cache.x), dtype=torch.bool, device=self.device)
        others_of = range(len(self.plans)) if self.config.mates == "all" else self.accepted
        shared[self.tensor([row for edit in others_of for row in self.plans[edit].rows])] = True
        others = mates(
            shared, [p.rows for p in plans], [p.negatives for p in plans], cache.x, self.config.mates_per_step
        )
        first = x[:, [number % width for number in range(neurons)]]
        slots: dict[str, torch.Tensor] = {}
        if self.task.decoding is not None:
            anchors = [self.slots[edit].anchors for edit in edits]
            places = self.tensor([[mine[number % len(mine)] for number in range(neurons)] for mine in anchors])
            first = x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            slots = self._slots(edits, neurons, width)
        values = torch.stack([self._noise(plan, neurons, turn, x.shape[-1]) for plan in plans]).to(x)
        return Problem(
            x=x,
            residual=cache.residual[index],
            base=cache.base[index] + self.neurons.output(plain.flatten(0, 1)).view_as(plain),
            labels=labels,
            required=required,
            # An edit that all else has failed for is worth more than silence on random texts.
            memory=seen(self.everything if coordinates is None else self.memory),
            held=seen(self.held),
            mates=seen(cache.x[others.rows]),
            foreign=others.foreign,
            crowd=seen(cache.x[self._shuffled(others.crowd, "crowd", plans[0].edit.request.id, str(turn))]),
            # The pre-activation starts at exactly 1 on the row it is made from (Transformer-Patcher, appendix).
            keys=first / first.square().sum(-1, keepdim=True),
            bias=x.new_zeros(len(plans), neurons),
            values=values,
            **slots,
        )

    def _slots(self, edits: list[int], neurons: int, width: int) -> dict[str, torch.Tensor]:
        """Which neuron must fire at which row, and that each token of a text weighs the same (see `Problem`)."""
        weights, acting, acts = [], [], []
        for edit in edits:
            plan, slots = self.plans[edit], self.slots[edit]
            of = [*slots.of, *[None] * (width - len(plan.rows))]
            count = len(slots.anchors)
            weights.append([float(row < len(plan.rows)) for row in range(width)])
            acting.append([[number % count == slot for number in range(neurons)] for slot in of])
            acts.append([row for row, slot in enumerate(of) if slot is not None])
        most = max(self.config.copies, *map(len, acts))
        acts = [[mine[place % len(mine)] for place in range(most)] for mine in acts]
        return {"weights": self.tensor(weights), "acting": self.tensor(acting), "acts": self.tensor(acts)}

    def _plan(self, edit: Edit, sampler: Sampler, method: str) -> Plan:
        chosen = sampler(edit, self.task.rng(method, "languages", edit.request.id))
        languages = {wording.language for wording in chosen}
        extra = [w for w in edit.rephrases if w.language in languages] if self.config.rephrases else []
        asked = [self.task.cache.asked(wording) for wording in (*chosen, *extra)]
        rows, labels = zip(*(pair for text in asked for pair in text), strict=True)
        texts = tuple(number for number, text in enumerate(asked) for _ in text)
        required = sum(map(len, asked[: len(chosen)]))
        return Plan(edit, chosen, rows, labels, texts, required, tuple(self.task.cache.want(edit.negatives)))

    def _memory_rows(self) -> list[int]:
        own = {plan.edit.versions[0].language for plan in self.plans}
        languages = own if self.config.memory_languages == "own" else None
        return memory_rows(self.task, languages, self.config.memory_rows, self.plans)

    def _random_rows(self) -> list[int]:
        """Rows of random texts that no edit is about."""
        pairs = any(plan.edit.versions[0].probe.text_pair is not None for plan in self.plans)
        drawn = noise(self.task.tokenizer, self.config.memory_noise, self.task.rng("noise"), pairs=pairs)
        edited = {row for plan in self.plans for row in plan.rows}
        return [row for row in dict.fromkeys(self.task.cache.want(drawn)) if row not in edited]

    def _coordinates(self) -> Coordinates | None:
        return Coordinates.whitened(self.typical()) if self.config.coordinates == "whitened" else None

    def typical(self) -> torch.Tensor:
        """Rows `[M, D]` that say what is usual: the memory's, and a sample of the edits' own."""
        rows = self.tensor(sorted({row for plan in self.plans for row in plan.rows}))
        return torch.cat((self.everything, self.task.cache.x[rows[:: len(rows) // _TYPICAL + 1]]))

    def _noise(self, plan: Plan, neurons: int, turn: int, width: int) -> torch.Tensor:
        return torch.randn(neurons, width, generator=self.task.generator("values", plan.edit.request.id, str(turn)))

    def _shuffled(self, rows: torch.Tensor, *salt: str) -> torch.Tensor:
        return rows[torch.randperm(len(rows), generator=self.task.generator(*salt)).to(rows.device)]

    def tensor(self, values: object) -> torch.Tensor:
        """Numbers or truth values on the model's device; int64 where there are none."""
        made = torch.tensor(values, device=self.device)
        return made if made.numel() else made.long()
