"""Bytes that one device holds, piece by piece, at the moment of a stage at which it holds most.

What is counted is what this program's code keeps: float32 masters, the copies of them that bfloat16 compute makes,
gradients, the optimizer's state, what layers keep for the backward pass (`logps.py`, `attention.py`), logits
(`packed.py`), and the sampler's keys and values (`play/slots.py`). docs/plan.md has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparring.batching import PIECE_LOGITS, most_tokens, whole_logits
from sparring.cost.shapes import Shape

Pieces = Mapping[str, float]
"""What holds memory to its bytes."""
PROGRAM = 0.5e9
"""Of Python, torch, transformers and pyarrow in this machine's memory; on CPU they are beside the tensors."""
FLOAT = 4
HEAP, HEAP_LEARNING = 1.0, 0.8
"""What glibc keeps of freed blocks, as a share of what layers and logits take where nothing is kept for a backward
pass, and in training; measured (docs/plan.md)."""
_HEAP_BLOCK, _LEARNING_BLOCK = 64e6, 14e6
"""Bytes of a layer's widest tensor from which blocks are given back instead; measured likewise."""
PACKED = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: every 64 share a scale of 8 bits, and 256 scales one of 32 (`lowbit.py`)."""
_ALIGNED = 16
STATES = {"rmsprop": 1, "adamw": 2, "adamw_8bit": 0.5, "paged_adamw_8bit": 0.5, "paged_adamw_32bit": 2}
"""Float32 numbers that an optimizer keeps per trained weight; paged ones may lie in the machine's memory instead."""


@dataclass(frozen=True)
class Pass:
    """The rows of one forward pass."""

    rows: int
    longest: int
    """Tokens of the longest row: a prompt and its completions."""
    tokens: int
    """Of all rows, prompts once."""
    scored: int
    """Completion tokens, for which the vocabulary is projected."""

    @property
    def padded(self) -> int:
        """Tokens that attention works on, on a GPU and by the plain path."""
        return self.rows * self.longest


@dataclass(frozen=True)
class Where:
    """How forward passes are made, on how many devices."""

    bf16: bool
    cuda: bool
    devices: int = 1
    lora_rank: int = 0
    quantized: bool = False
    """The base's layers are in 4 bits."""
    checkpointing: bool = False
    plain: bool = False
    """The method reads logits, so that rows are padded and logits of all of them are kept."""

    @property
    def size(self) -> int:
        """Bytes of a computed number."""
        return 2 if self.bf16 else FLOAT

    @property
    def most_tokens(self) -> int:
        """Of a pass that keeps nothing for a backward pass."""
        return most_tokens(cuda=self.cuda, half=self.bf16)


def _beside(shape: Shape, where: Where, held: Pieces, rows: Pass, learns: bool = False) -> Pieces:
    """With what else is in the same memory on CPU: the program, and the heap's free blocks."""
    if where.cuda:
        return held
    passing = sum(size for name, size in held.items() if name in ("pass", "logits", "activations"))
    block = rows.tokens * shape.inner * where.size
    if where.quantized:
        # Loaded whole, before it is packed
        held = widest(held, {"weights": FLOAT * shape.parameters})
    heap = HEAP_LEARNING * (block < _LEARNING_BLOCK) if learns else HEAP * (block < _HEAP_BLOCK)
    return {"program": PROGRAM, **held, "heap": heap * passing}


def widest(*held: Pieces) -> dict[str, float]:
    """The largest of several."""
    largest: Pieces = {}
    for pieces in held:
        largest = pieces if sum(pieces.values()) > sum(largest.values()) else largest
    return dict(largest)


def weights(shape: Shape, where: Where, copies: int = 1) -> dict[str, float]:
    """Float32 masters of `copies` models, and one model's matrices as bfloat16 compute needs them.

    On several devices each has its part of the masters; the embeddings and three layers are gathered whole, and one
    matrix at a time is cast. Of layers in 4 bits one matrix at a time is unpacked.
    """
    numbers = shape.parameters * copies + (shape.adapter(where.lora_rank) if where.lora_rank else 0)
    held: dict[str, float] = {"weights": FLOAT * numbers / where.devices}
    if where.quantized:
        held["weights"] -= (FLOAT - PACKED) * copies * shape.layers * shape.layer
        held["unpacked"] = where.size * shape.inner * shape.hidden
        return held | ({"casts": 2 * shape.head} if where.bf16 else {})
    if where.devices > 1:
        held["gathered"] = FLOAT * (3 * shape.layer + (1 if shape.tied else 2) * shape.head)
    if where.bf16:
        widest = max(shape.inner * shape.hidden, shape.head)
        held["casts"] = 2 * (widest if where.devices > 1 else shape.layers * shape.layer + shape.head)
    return held


def kept(shape: Shape, where: Where, rows: Pass) -> float:
    """Bytes that one layer keeps for the backward pass.

    Two norms keep their input, it normalised for the gradient of their weight, and in float32 their output; attention
    its queries, keys, values, output and two numbers a head (on a GPU padded queries, repeated keys and values and the
    output twice); the MLP its gate, silu(gate), up and their product. In bfloat16 the norms stay float32 and keep no
    output, but each of five linear layers keeps its own cast of it. An adapter keeps what lies between its two factors.
    On a CPU attention is taken to be in C, so that neither weights nor masks are there. Layers in C (`fused.py`) keep what
    norms read and one number a token of each, queries, keys, values, attention's output, gate and up.
    """
    h, q, k, inner, size = shape.hidden, shape.queries, shape.keys, shape.inner, where.size
    if _fused(where):
        return rows.tokens * (FLOAT * (2 * h + 2 * shape.heads + 2) + size * (2 * q + 2 * k + 2 * inner))
    inputs, scaled = 2 * FLOAT * h, 2 * FLOAT * h * (not where.lora_rank)
    norms = inputs + scaled + (5 * 2 * h if where.bf16 else 2 * FLOAT * h)
    if where.cuda:
        attention = rows.padded * (size * 4 * q + FLOAT * shape.heads)
    else:
        attention = rows.tokens * (size * (q + 2 * k) + 2 * FLOAT * shape.heads)
    return rows.tokens * (norms + size * (q + 4 * inner + 7 * where.lora_rank)) + attention


def _fused(where: Where) -> bool:
    """Whether layers are taken to be in C (`fused.py`), as those of all kinds of models that a plan counts can be."""
    return not (where.cuda or where.plain or where.lora_rank or where.quantized or where.devices > 1)


def passing(shape: Shape, where: Where, rows: Pass) -> float:
    """Bytes of the widest moment within a layer that keeps nothing: its MLP, or its attention, with a mask on a GPU."""
    h, q, k, size = shape.hidden, shape.queries, shape.keys, where.size
    mlp = rows.tokens * (2 * FLOAT * h + size * 3 * shape.inner)
    attention = rows.tokens * (2 * FLOAT * h + FLOAT * (q + 2 * k))
    if where.cuda:
        attention += rows.padded * size * (4 * q + 2 * k) + rows.padded * rows.longest * (1 + size)
    else:
        attention += rows.tokens * size * (2 * q + 2 * k)
    return max(mlp, attention)


def logits(shape: Shape, where: Where, rows: Pass, *, learns: bool) -> float:
    """Bytes of the logits that are there at a time, and of their gradient.

    Where they are too many they are made in pieces. The plain path makes those of every padded token, keeps them in
    float32, aligned and spread over groups as well.
    """
    if where.plain:
        count = rows.padded * shape.vocabulary
        return count * (where.size + 3 * FLOAT) * (2 if learns else 1)
    count = rows.scored * shape.vocabulary
    some = count if whole_logits(count, where.size) else min(PIECE_LOGITS, count)
    return some * where.size * (2 if learns else 1)


def playing(shape: Shape, where: Where, width: int, room: int, prompts: Pass, models: int = 1) -> Pieces:
    """Answering `width` prompts at a time in slots of `room` tokens; `prompts` is the largest batch that is read."""
    slots = width * (-(-room // _ALIGNED) * _ALIGNED)
    store = 2 * shape.keys * shape.layers * slots * where.size
    drawn = width * shape.vocabulary * (3 * FLOAT + where.size)
    held = weights(shape, where, models)
    held |= {"keys and values": models * store, "pass": max(passing(shape, where, prompts), drawn)}
    return _beside(shape, where, held, prompts)


def served(
    shape: Shape, where: Where, spread: int, room: int, width: int, context: int, most: float
) -> tuple[Pieces, int]:
    """What vLLM holds on each of `spread` devices, and how many sequences of `room` tokens it has under way.

    Weights in compute precision; keys and values of at most `width` sequences, as many as `most` bytes leave room for, but
    of one as long as the context, without which it does not start.
    """
    held = where.size * shape.parameters / spread
    token = 2 * shape.keys * shape.layers * where.size / spread
    some = max(1, min(width, int((most - held) // (room * token))))
    return {"weights": held, "keys and values": token * max(some * room, context)}, some


def scoring(shape: Shape, where: Where, rows: Sequence[Pass]) -> Pieces:
    """Log-probs of rows, of which nothing is kept."""
    most = max(rows, key=lambda r: _score(shape, where, r))
    logit, layer = logits(shape, where, most, learns=False), passing(shape, where, most)
    held = weights(shape, where) | ({"logits": logit} if logit > layer else {"pass": layer})
    return _beside(shape, where, held, most)


def _score(shape: Shape, where: Where, rows: Pass) -> float:
    return max(logits(shape, where, rows, learns=False), passing(shape, where, rows))


def trained(shape: Shape, where: Where) -> int:
    """Weights that training changes."""
    return shape.adapter(where.lora_rank) if where.lora_rank else shape.parameters


def training(
    shape: Shape, where: Where, optimizer: str, micro: Sequence[Pass], reading: Sequence[Pass], *, steps: int,
    accumulates: bool, companions: int = 0,
) -> Pieces:  # fmt: skip
    """A round's training; `micro` are its forward passes, `reading` those of its guard.

    accumulates: a step has several passes, so that gradients are there while activations are. On several devices
    masters, gradients and the optimizer's state are divided among them; the embeddings, two layers and the gradient of
    one are gathered whole, in float32, but not for the update. bfloat16 casts stay for the backward pass: of all layers,
    but where several devices recompute layers of one.
    """
    changed, n = trained(shape, where), where.devices
    held = weights(shape, where)
    if where.bf16 and n > 1:
        every = shape.layers * shape.layer + shape.head
        held["casts"] = 2 * (max(shape.layer, shape.head) if where.checkpointing else every)
    if companions:
        held["companions"] = companions * sum(weights(shape, replace(where, devices=1)).values())
    gradients, state = FLOAT * changed / n, FLOAT * changed * STATES[optimizer] / n
    held["optimizer"] = state if steps > 1 else 0.0
    most = max(micro, key=lambda r: _learn(shape, where, r))
    whole = shape.layers * kept(shape, where, most)
    if where.checkpointing:
        whole = shape.layers * FLOAT * shape.hidden * most.tokens + kept(shape, where, most)
    last = FLOAT * 3 * shape.hidden * most.tokens
    wide = logits(shape, where, most, learns=True) + (0 if where.lora_rank else FLOAT * shape.head / n)
    within = (4 if _fused(where) else 3) * where.size * shape.inner * most.tokens
    learning = {"activations": whole + last, "logits": max(wide, within)}
    learning |= {"gradients": gradients} if accumulates else {}
    update = {"optimizer": state, "gradients": gradients, "casts": 0.0, "gathered": 0.0}
    update["update"] = FLOAT * changed / n if where.cuda else 2 * FLOAT * shape.head * (not where.lora_rank)
    read = {"gradients": gradients, "pass": max((_score(shape, where, r) for r in reading), default=0.0)}
    held = widest(held | learning, held | update, held | read)
    return _beside(shape, where, held, most, learns=True)


def _learn(shape: Shape, where: Where, rows: Pass) -> float:
    return shape.layers * kept(shape, where, rows) + logits(shape, where, rows, learns=True)
