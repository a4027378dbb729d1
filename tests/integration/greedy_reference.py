"""What transformers generates greedily, in float32, for a fixed set of prompts; and how to compare with it.

The reference costs most of a minute, so it is computed once, for the tests of one file.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from text.tokenizer import Tokenizer

MAX_NEW_TOKENS = 16
NEAR_TIE = 1e-4
"""Where transformers' two best logits lie closer than this, either token is right."""
_PAGE_TOKENS = 16
_BATCH, _SHORT = 8, 200
"""Prompts that are generated for together, if they have no more tokens."""
_LENGTHS = (
    *range(1, 19),
    *(23, 31, 32, 33, 34, 40, 47, 48, 49, 57, 63, 64, 65, 66, 71, 79, 80, 81, 95, 96, 97),
    *(111, 127, 128, 129, 150, 160, 177, 200, 256, 257, 300, 513, 1300, 3000),
)
_TEXT = (
    "the a one every small old bright quiet river city engine letter number teacher garden window winter question "
    "music runs keeps finds asks writes opens remembers carries near under after because and but while of to in for "
    "with between slowly always never twice again three seven hundred"
)


@dataclass(frozen=True)
class Reference:
    """One prompt, what follows it, and how sure transformers was of each token."""

    prompt: list[int]
    tokens: list[int]
    margins: list[float]
    """Best logit less the second best, at each token."""


def at_page_edges(references: Sequence[Reference]) -> list[Reference]:
    """Those whose prompts end with a page of KV, or a token before or after: half of them."""
    return [each for each in references if len(each.prompt) % _PAGE_TOKENS in (_PAGE_TOKENS - 1, 0, 1)]


def greedy_reference(folder: Path) -> tuple[Reference, ...]:
    """53 prompts of 1 to 3,000 tokens with up to `MAX_NEW_TOKENS` that follow each, by `generate`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads gain little here, and lose much where another process wants the cores too
    try:
        batches = _batches(_prompts(Tokenizer.load(folder)))
        return tuple(reference for batch in batches for reference in _generate(model, batch))
    finally:
        torch.set_num_threads(threads)


def differences(references: Sequence[Reference], outputs: Mapping[int, list[int]]) -> list[str]:
    """Where output `i` leaves reference `i`, in words; only near ties. Anything else is an AssertionError."""
    found = []
    for index, reference in enumerate(references):
        ours = outputs[index]
        if ours == reference.tokens:
            continue
        pairs = list(zip(ours, reference.tokens, strict=False))
        place = next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))
        margin = reference.margins[min(place, len(reference.margins) - 1)]
        where = (
            f"prompt {index} of {len(reference.prompt)} tokens leaves transformers at token {place}, where its two "
            f"best logits are {margin:.2e} apart: {ours} for {reference.tokens}"
        )
        assert place < len(pairs), where
        assert margin < NEAR_TIE, where
        found.append(where)
    return found


def _prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """Sentences of made-up text, each of its own; every third as a chat's beginning."""
    prompts = []
    for index, length in enumerate(_LENGTHS):
        draw = random.Random(index)
        words = " ".join(draw.choices(_TEXT.split(), k=length + 8))
        text = f"<|im_start|>user\n{words}" if index % 3 == 0 else words.capitalize()
        prompts.append(tokenizer.encode(text, add_special_tokens=False)[:length])
        assert len(prompts[-1]) == length
    return prompts


def _batches(prompts: list[list[int]]) -> Iterator[list[list[int]]]:
    """In their order, which is that of their lengths: short ones together, long ones alone."""
    together = sum(len(prompt) <= _SHORT for prompt in prompts)
    for start in range(0, together, _BATCH):
        yield prompts[start : min(start + _BATCH, together)]
    for prompt in prompts[together:]:
        yield [prompt]


def _generate(model: transformers.PreTrainedModel, prompts: list[list[int]]) -> Iterator[Reference]:
    """Of prompts of about the same length, filled up on their left."""
    width, eos = max(map(len, prompts)), model.generation_config.eos_token_id
    with torch.inference_mode():
        output = model.generate(
            torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=eos,
            return_dict_in_generate=True,
            output_logits=True,
        )
    best = torch.stack(output.logits, dim=1).topk(2).values
    margins = (best[..., 0] - best[..., 1]).tolist()
    for row, prompt in enumerate(prompts):
        tokens = output.sequences[row, width:].tolist()
        length = tokens.index(eos) + 1 if eos in tokens else len(tokens)
        yield Reference(prompt=prompt, tokens=tokens[:length], margins=margins[row][:length])
