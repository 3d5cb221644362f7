"""Decoding in slots: a row that ends gives its place to the next prompt, whatever the others are at.

Keys and values of every slot lie in one store per layer that is made once; on CPUs `decode.c` attends to them. Prompts
are read in one row without padding, those that follow each other and are equal only once; a step is one row of one token
per slot. Both are the packed rows of `attention.py`, so any model that can be trained on those can be decoded so:
`decodes` tries it once per model.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparring.attention import Layout, Rule, States, packed, unwrapped
from sparring.logps import batches, packs, pass_tokens
from sparring.packed import head
from sparring.play.decode import kernel
from sparring.play.padded import Choose, Prompts, Row
from sparring.progress import OnRows, silent
from sparring.tiles import scores
from sparring.tree import Tree

log = logging.getLogger("sparring")

Decoder = Callable[[Tensor, Tensor, Layout], Tensor]
"""Token ids and positions [1, N] and a layout to hidden states [N, H]."""
_ALIGNED = 16
_FREE = 8
"""Slots are filled again, or dropped, when one in so many is free."""
_DECODES: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def decode(
    models: Sequence[Any], prompts: Prompts, uniforms: Callable[[Sequence[int]], Tensor], length: int,
    stop_ids: Sequence[int], size: int, choose: Choose, on_rows: OnRows = silent, graph: Decoder | None = None,
) -> list[Row]:  # fmt: skip
    """Each prompt's answer of at most `length` tokens and their log-probs; prompts are begun in the order given.

    `uniforms` gives those [N, length] of some rows. At most `size` rows are decoded at a time. `graph` is how the first
    model's steps are computed, of two rows or more.
    """
    width = min(size, len(prompts))
    steps = [graph, *[None] * len(models)]
    engines = [Slots(m, width, max(map(len, prompts)) + length, s) for m, s in zip(models, steps, strict=False)]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(packed(model))
        return _decode(engines, prompts, uniforms, length, set(stop_ids), width, choose, on_rows)


def _decode(
    engines: Sequence[Slots], prompts: Prompts, uniforms: Callable[[Sequence[int]], Tensor], length: int,
    stops: set[int], width: int, choose: Choose, on_rows: OnRows,
) -> list[Row]:  # fmt: skip
    answers: list[Row] = [([], []) for _ in prompts]
    waiting = deque(range(len(prompts)))
    device = engines[0].device
    rows: list[int | None] = [None] * width
    u = torch.zeros(width, length, dtype=torch.float64, device=device)
    drawn = torch.zeros(width, 1, dtype=torch.long, device=device)
    last = torch.zeros(width, dtype=torch.long, device=device)
    while True:
        free = [slot for slot, row in enumerate(rows) if row is None]
        if not waiting and len(free) == len(rows):
            return answers
        enough = len(free) >= max(1, len(rows) // _FREE)
        if waiting and enough:
            chosen = free[: len(waiting)]
            new = [waiting.popleft() for _ in chosen]
            place = torch.tensor(chosen, device=device)
            logits = [engine.fill([prompts[i] for i in new], chosen) for engine in engines]
            u[place] = uniforms(new).to(device)
            token, logp = choose(logits, u[place, 0])
            last[place], drawn[place] = token, 1
            for slot, row in zip(chosen, new, strict=True):
                rows[slot] = row
        else:
            if enough:
                _compact(engines, rows, (u, drawn, last))
                width = len(rows)
            longest = max(len(prompts[row]) + len(answers[row][0]) for row in rows if row is not None)
            logits = [engine.step(last[:width], longest) for engine in engines]
            token, logp = choose(logits, u[:width].gather(1, drawn[:width])[:, 0])
            last[:width] = token
            drawn.add_(1).clamp_(max=length - 1)
            chosen = list(range(width))
        ended, decoded = [], 0
        for slot, t, p in zip(chosen, token.tolist(), logp.tolist(), strict=True):
            held = rows[slot]
            if held is None:
                continue
            decoded += 1
            tokens, logps = answers[held]
            tokens.append(t)
            logps.append(p)
            if t in stops or len(tokens) == length:
                rows[slot] = None
                ended.append(slot)
        on_rows(len(ended), decoded)
        if ended:
            place = torch.tensor(ended, device=device)
            for engine in engines:
                engine.empty(place)


def _compact(engines: Sequence[Slots], rows: list[int | None], tables: Sequence[Tensor]) -> None:
    """Rows move from the last slots to free ones, so that those that are taken come first; the others are dropped."""
    left = sum(row is not None for row in rows)
    sources = [slot for slot in range(left, len(rows)) if rows[slot] is not None]
    targets = [slot for slot in range(left) if rows[slot] is None]
    if sources:
        device = tables[0].device
        places = torch.tensor(sources, device=device), torch.tensor(targets, device=device)
        for engine in engines:
            engine.move(*places)
        for table in tables:
            table[places[1]] = table[places[0]]
    for source, target in zip(sources, targets, strict=True):
        rows[target] = rows[source]
    del rows[left:]


class Slots:
    """A model, within `attention.packed`, and what it remembers of the rows it is decoding."""

    def __init__(self, model: Any, size: int, room: int, steps: Decoder | None = None) -> None:
        """`size` rows of at most `room` tokens each; `steps` decodes one more token of two rows or more."""
        self.steps = steps
        self._base = unwrapped(model)
        self._decoder = self._base.get_decoder()
        self.device = next(model.parameters()).device
        kind = self.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._most = pass_tokens(model, compute)
        self._store = _Store(size, -(-room // _ALIGNED) * _ALIGNED)
        self._ones = torch.ones(1, size, dtype=torch.long, device=self.device)
        self._position = torch.zeros(size, dtype=torch.long, device=self.device)
        """Of each slot's next token."""
        self._grows = torch.zeros_like(self._position)

    def fill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        """Logits [N, V], float32, of what follows each prompt; prompt i takes slot `slots[i]`."""
        runs = [list(run) for _, run in groupby(range(len(prompts)), key=lambda i: prompts[i])]
        sizes = [len(prompts[run[0]]) for run in runs]
        logits = [
            self._read([prompts[runs[r][0]] for r in chosen], [[slots[i] for i in runs[r]] for r in chosen])
            for chosen in batches(sizes, [1] * len(runs), len(runs), self._most)
        ]
        return torch.cat(logits)

    def step(self, tokens: Tensor, longest: int) -> Tensor:
        """Logits [N, V], float32, of what follows one more token in each of the first N slots; noise for empty ones.

        `longest` is how many tokens any of them holds then.
        """
        position = self._position[: len(tokens)]
        layout = _Step(self._store, position, min(-(-longest // _ALIGNED) * _ALIGNED, self._store.room))
        # A graph for any number of rows is none for a single one: torch takes 1 to be a number of its own
        decoder = self.plain if self.steps is None or len(tokens) == 1 else self.steps
        hidden = decoder(tokens[None], position[None], layout)
        position += self._grows[: len(tokens)]
        return head(self._base, self._decoder, hidden).float()

    def empty(self, slots: Tensor) -> None:
        """Rows in these slots have ended; until others take their place, steps go to their first position."""
        self._position[slots] = 0
        self._grows[slots] = 0

    def move(self, sources: Tensor, targets: Tensor) -> None:
        """Rows in slots `sources` go to slots `targets`."""
        self._store.move(sources, targets)
        self._position[targets], self._grows[targets] = self._position[sources], 1

    def _read(self, prompts: list[Sequence[int]], slots: list[list[int]]) -> Tensor:
        tree = Tree(prompts, [[] for _ in prompts], self.device, fill=True)
        hidden = self.plain(tree.ids, tree.positions, _Reading(self._store, tree, prompts, slots, self.device))
        sizes = torch.tensor([len(p) for p in prompts], device=self.device)
        copies = torch.tensor([len(own) for own in slots], device=self.device)
        taken = torch.tensor([slot for own in slots for slot in own], device=self.device)
        self._position[taken], self._grows[taken] = sizes.repeat_interleave(copies), 1
        logits = head(self._base, self._decoder, hidden.index_select(0, sizes.cumsum(0) - 1))
        return logits.float().repeat_interleave(copies, 0)

    def plain(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """A `Decoder`: the model's own."""
        seen = self._ones[:, : ids.shape[1]] if ids.shape[1] <= self._ones.shape[1] else torch.ones_like(ids)
        out = self._decoder(input_ids=ids, attention_mask=seen, position_ids=positions, use_cache=False, layout=layout)
        hidden: Tensor = out.last_hidden_state[0]
        return hidden


class _Store:
    """Keys and values, [slots, key heads, room, D] for each layer."""

    def __init__(self, slots: int, room: int) -> None:
        self.slots, self.room = slots, room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, number: int, states: States) -> tuple[Tensor, Tensor]:
        """A layer's, for keys and values like these."""
        if number not in self._layers:
            # Zeros, as attention multiplies what it does not see by zero, which is no help against NaN
            keys, values = (
                x.new_zeros(self.slots, x.shape[1], self.room, x.shape[2]) for x in (states.key, states.value)
            )
            self._layers[number] = keys, values
        return self._layers[number]

    def places(self, slots: Tensor, positions: Tensor, heads: int) -> Tensor:
        """[N · heads] where the numbers of the tokens at these positions of these slots are, head by head."""
        head = torch.arange(heads, device=slots.device)
        return ((slots[:, None] * heads + head) * self.room + positions[:, None]).flatten()

    def move(self, sources: Tensor, targets: Tensor) -> None:
        for x in (x for pair in self._layers.values() for x in pair):
            x.index_copy_(0, targets, x.index_select(0, sources))


def _put(store: tuple[Tensor, Tensor], places: Tensor, key: Tensor, value: Tensor) -> None:
    """Write keys and values [N, key heads, D] to where `_Store.places` says."""
    for x, new in zip(store, (key, value), strict=True):
        x.view(-1, x.shape[-1]).index_copy_(0, places, new.flatten(0, 1))


class _Reading:
    """The layout of whole prompts, which are stored as they are read."""

    def __init__(
        self, store: _Store, tree: Tree, prompts: list[Sequence[int]], slots: list[list[int]], device: torch.device
    ) -> None:
        self._store, self._tree = store, tree
        rows: list[int] = []
        taken: list[int] = []
        positions: list[int] = []
        at = 0
        for prompt, own in zip(prompts, slots, strict=True):
            for slot in own:
                rows += range(at, at + len(prompt))
                taken += [slot] * len(prompt)
                positions += range(len(prompt))
            at += len(prompt)
        self._rows, self._slots, self._positions = (torch.tensor(x, device=device) for x in (rows, taken, positions))
        # Lengths do not tell: the row may be filled up by as many tokens as copies have
        self._copied = rows != list(range(tree.ids.shape[1]))
        self._places: dict[int, Tensor] = {}
        self._read: set[int] = set()

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        # HRM's layers, which a pass goes through again, share a number and have keys of their own
        if layer in self._read:
            raise TypeError(f"its layer {layer} attends more than once in a pass")
        self._read.add(layer)
        key, value = states.key, states.value
        if self._copied:
            key, value = (x.index_select(0, self._rows) for x in (key, value))
        heads = key.shape[1]
        if heads not in self._places:
            self._places[heads] = self._store.places(self._slots, self._positions, heads)
        _put(self._store.layer(layer, states), self._places[heads], key, value)
        return self._tree.attend(layer, states, rule)


class _Step:
    """The layout of one token per slot."""

    def __init__(self, store: _Store, position: Tensor, longest: int) -> None:
        self._store, self._position, self._longest = store, position, longest
        self._places: dict[int, Tensor] = {}
        # By a rule's id, which stays its own as long as it is kept here
        self._spans: dict[int, tuple[Rule, tuple[Tensor, Tensor] | None]] = {}
        self._biases: dict[int, tuple[Rule, Tensor]] = {}

    def attend(self, layer: int, states: States, rule: Rule) -> Tensor:
        store = self._store.layer(layer, states)
        mixed = self._in_c(store, states, rule)
        return self._in_torch(store, states, rule) if mixed is None else mixed

    def _in_c(self, store: tuple[Tensor, Tensor], states: States, rule: Rule) -> Tensor | None:
        """Attention of a CPU's kernel, which stores the new keys and values; None where there is none for this."""
        query, key, value = states.query, states.key, states.value
        (_, heads, width), groups = query.shape, key.shape[1]
        if query.device.type != "cpu" or states.softcap is not None or value.shape[-1] != width:
            return None
        in_c, span = kernel(query.dtype, groups, heads // groups, width), self._span(rule)
        if in_c is None or span is None:
            return None
        return in_c(query.contiguous(), key.contiguous(), value.contiguous(), *store, *span, states.scale)

    def _in_torch(self, store: tuple[Tensor, Tensor], states: States, rule: Rule) -> Tensor:
        query, groups = states.query, states.key.shape[1]
        count, heads, width = query.shape
        if groups not in self._places:
            slots = torch.arange(count, device=query.device)
            self._places[groups] = self._store.places(slots, self._position, groups)
        _put(store, self._places[groups], states.key, states.value)
        keys, values = (x[:count, :, : self._longest] for x in store)
        bias = self._bias(rule, query.dtype)
        if states.softcap is not None:
            return scores(query[:, :, None], keys, values, bias, states.scale, states.softcap)[:, :, 0]
        # Query heads that share a key head go in as its queries: keys are not copied
        mixed = functional.scaled_dot_product_attention(
            query.view(count, groups, -1, width), keys, values, attn_mask=bias[:, None], scale=states.scale
        )
        return mixed.reshape(count, heads, -1)

    def _sees(self, rule: Rule) -> Tensor:
        """[N, L] True where a token may see a key."""
        zero, place = self._position.new_zeros(()), torch.arange(self._longest, device=self._position.device)
        return rule(zero, zero, self._position[:, None], place).expand(len(self._position), -1)

    def _span(self, rule: Rule) -> tuple[Tensor, Tensor] | None:
        """From and to, [N], of the keys that each token sees; None where they are not those up to its own, from somewhere on."""
        if id(rule) not in self._spans:
            seen, place = self._sees(rule), torch.arange(self._longest)
            first, end = seen.to(torch.uint8).argmax(-1), self._position + 1
            together = torch.equal(seen, (place >= first[:, None]) & (place < end[:, None]))
            self._spans[id(rule)] = rule, (first, end) if together else None
        return self._spans[id(rule)][1]

    def _bias(self, rule: Rule, dtype: torch.dtype) -> Tensor:
        """[N, 1, L] 0 where a token may see a key and −inf elsewhere."""
        if id(rule) not in self._biases:
            seen = self._sees(rule)
            bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._biases[id(rule)] = rule, bias[:, None]
        return self._biases[id(rule)][1]


def decodes(model: nn.Module) -> bool:
    """Whether slots give a model's own logits, tried on a few tokens when a model is first asked."""
    base = unwrapped(model)
    if base not in _DECODES:
        problem = "it takes no packed rows" if not packs(base) else _problem(base)
        if problem:
            log.info("%s: decoded in whole batches, slower and with the same answers: %s", type(base).__name__, problem)
        _DECODES[base] = problem is None
    return packs(base) and _DECODES[base]


@torch.no_grad()
def _problem(base: Any) -> str | None:
    """Why a model that takes packed rows cannot be decoded in slots; None where it can."""
    with torch.autocast(next(base.parameters()).device.type, enabled=False):  # whatever the caller computes in
        return _tried(base)


def _tried(base: Any) -> str | None:
    most = min(base.get_output_embeddings().weight.shape[0], 1000)
    ids = [(7 * i + 3) % most for i in range(12)]
    prompts, after = [ids[:8], ids[8:10]], torch.tensor(ids[10:])
    training = base.training
    base.eval()
    try:
        slots = Slots(base, 2, 10)
        with packed(base):
            slots.fill(prompts, [0, 1])
            got = slots.step(after.to(slots.device), 9).log_softmax(-1)
        for row, prompt, token in zip(got, prompts, after.tolist(), strict=True):
            plain = base(input_ids=torch.tensor([[*prompt, token]], device=slots.device), use_cache=False).logits[0, -1]
            apart = float((row - plain.float().log_softmax(-1)).abs().max())
            if not apart < (1e-2 if plain.dtype in (torch.float32, torch.float64) else 0.5):
                return f"it would give log-probs that differ by {apart:.2g}"
    except Exception as error:  # models fail in as many ways as there are models
        return str(error).strip().split("\n")[0] or type(error).__name__
    finally:
        base.train(training)
    return None
