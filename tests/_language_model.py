"""A language model of two layers with random weights, in transformers' own form, and a tokenizer of single bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def tiny_llama(**changes: Any) -> Any:
    """A Llama of 256 tokens whose embedding and head are tied; its weights are large, so that logits differ."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    known = {"vocab_size": 256, "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.2}
    tokens = {"bos_token_id": None, "eos_token_id": 255}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **known, **tokens, **changes})).eval()


def save_tiny(module: Any, folder: Path) -> Any:
    """The model and its tokenizer as `save_pretrained` writes them; returns the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    module.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return tokenizer


def greedy(module: Any, prompt: list[int], count: int) -> list[int]:
    """The tokens that transformers itself adds to a prompt."""
    import torch

    found = module.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return [int(token) for token in found[0, len(prompt) :]]
