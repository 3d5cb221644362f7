"""Small tokenizers made from scratch, one per family that people fine-tune; each takes milliseconds to train.

Not called `tokenizers.py`: pytest puts this folder first on the path, and transformers would import it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "models" / "stories260K"

CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ raise_exception('only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Question: what is 12 + 30? Answer: 12 + 30 = 42.\n#### 42\n\nThat is the answer to the question.",
    "system user assistant\n### Instruction:\n### Response:\nYou are a helpful assistant.",
    "def add(a, b):\n    return a + b\n\nnaïve café, 你好, мир, שלום",
]


def _special(text: str) -> AddedToken:
    return AddedToken(text, special=True, normalized=False)


def _bytelevel(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


@cache
def chatml() -> PreTrainedTokenizerBase:
    """Byte-level BPE as in GPT-2 and Qwen; `<think>` is an added token but not a special one."""
    tokenizer = _bytelevel(380)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens([_special(t) for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


@cache
def llama3() -> PreTrainedTokenizerBase:
    """Byte-level BPE whose template writes the BOS, trims contents and ends turns with a token that is not EOS."""
    tokenizer = _bytelevel(340)
    names = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer.add_special_tokens([_special(name) for name in names])
    bos = (names[0], tokenizer.token_to_id(names[0]))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{names[0]} $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=names[0], eos_token=names[1], chat_template=LLAMA3
    )


def _sentencepiece(scheme: str) -> Tokenizer:
    draft = Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.Metaspace()
    draft.train_from_iterator(CORPUS[:3], trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = sorted(draft.get_vocab(), key=draft.token_to_id)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    merges = [(a, b) for a, b in json.loads(draft.to_str())["model"]["merges"]]
    bpe = models.BPE(
        {piece: id for id, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    if scheme == "legacy":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([_special(piece) for piece in pieces[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def zephyr(scheme: str) -> PreTrainedTokenizerBase:
    """SentencePiece-like BPE; `<|user|>` is plain text in the template. `scheme`: `legacy`, `always` or `first`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_sentencepiece(scheme),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=ZEPHYR,
    )


@cache
def characters() -> PreTrainedTokenizerBase:
    """One token per character, no chat template, no BOS, no PAD."""
    letters = sorted(set("".join(CORPUS)) | set("\n<>|/_[]#.$éß"))
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(["<unk>", *letters])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([_special("<eos>"), _special("<unk>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@cache
def unigram() -> PreTrainedTokenizerBase:
    """A Unigram model with its control tokens in the vocabulary, where spelling alone would find them."""
    letters = sorted(set("".join(CORPUS[:3])) | set("▁<>|/s"))
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in letters if letter != " ")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    tokenizer.add_special_tokens([_special("<unk>"), _special("</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", chat_template=ZEPHYR
    )


@cache
def stories() -> PreTrainedTokenizerBase:
    """The real Llama tokenizer of stories260K; no chat template."""
    return AutoTokenizer.from_pretrained(str(STORIES), local_files_only=True)


MAKERS = {
    "chatml": chatml,
    "llama3": llama3,
    "zephyr-legacy": lambda: zephyr("legacy"),
    "zephyr-always": lambda: zephyr("always"),
    "zephyr-first": lambda: zephyr("first"),
    "unigram": unigram,
    "characters": characters,
    "stories260K": stories,
}
