"""What 8-bit KV on the wire costs in quality: perplexity and greedy tokens after a prefix whose KV was moved that way.

For each window of text the model computes a prefix, as prefill does. Its KV then goes through `transfer.int8_codec`,
whole pages with one scale for each layer, head and K or V, as it would between two hosts, and the model goes on from
what came back, as decode does: over the text that really follows (perplexity, and which token is likeliest), and
greedily. Everything but the prefix's KV is equal; the same with KV as stored is the comparison, and KV rounded to
bfloat16 in a float32 model shows how much a more familiar rounding costs.

The text is Python's own language reference, as its help system has it.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.moved_kv import Rounding, Windows, as_bfloat16, as_bytes, as_int8, as_stored, whole_pages
from benchmarks.report import Report, Table, add_report_options, finish
from engine.model.loader import load_model
from text.tokenizer import Tokenizer
from transfer.int8_codec import Int8Codec, coded_bytes


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one way of moving KV."""

    log_loss: float
    """Mean negative log-likelihood of the text after the prefixes, in nats per token."""
    likeliest: np.ndarray
    """`[windows, tokens]`: the token with the best logit at each place of the text."""
    greedy: np.ndarray
    """`[windows, tokens]`."""
    divergence: float
    """Kullback-Leibler, in nats per token of the text, from KV as stored."""


def measure(
    windows: Windows, num_windows: int, rounding: Rounding, *, num_greedy: int, stored: list[torch.Tensor]
) -> Quality:
    """Move the prefixes' KV by `rounding`, and go on.

    `stored` is what the model expects of each window's text after KV as stored, float16 `[tokens, vocab]`; the first
    call, which is for that, finds it empty and fills it.
    """
    windows.reset(rounding)
    losses, likeliest, divergences = [], [], []
    for index in range(num_windows):
        log_probs = torch.log_softmax(windows.follow(index).float(), dim=-1)
        if len(stored) == index:
            stored.append(log_probs.half())
        truth = stored[index].float()
        losses.append(-log_probs.gather(1, windows.expected(index)[:, None]).mean().item())
        likeliest.append(log_probs.argmax(dim=-1).numpy())
        divergences.append((truth.exp() * (truth - log_probs)).sum(dim=-1).mean().item())
    windows.reset(rounding)
    return Quality(
        log_loss=float(np.mean(losses)),
        likeliest=np.stack(likeliest),
        greedy=windows.generate(num_greedy),
        divergence=float(np.mean(divergences)),
    )


def error_rows(table: Table, windows: Windows, name: str) -> None:
    """How far K and V are from what they were."""
    windows.reset(as_stored)
    before = windows.pool.data.float().clone()
    windows.reset(as_int8)
    error = windows.pool.data.float() - before
    for index, kind in enumerate("KV"):
        kept, wrong = before[:, :, :, index], error[:, :, :, index]
        largest = kept.abs().amax(dim=(-1, -2), keepdim=True)
        bound = (wrong.abs() / largest.clamp_min(1e-30)).max().item()
        table.add(name, kind, f"{100 * (wrong.norm() / kept.norm()).item():.2f}", f"{bound:.5f}")


def compare(table: Table, name: str, form: str, quality: Quality, stored: Quality) -> None:
    """One row: `quality` beside that of KV as stored."""
    change = 100 * (np.exp(quality.log_loss - stored.log_loss) - 1)
    same = quality.greedy == stored.greedy
    until = np.where(same.all(axis=1), same.shape[1], same.argmin(axis=1))
    table.add(
        name,
        form,
        f"{np.exp(quality.log_loss):.4f}",
        f"{change:+.3f}",
        f"{quality.divergence:.5f}",
        f"{100 * (quality.likeliest == stored.likeliest).mean():.2f}",
        f"{100 * until.mean() / same.shape[1]:.1f}",
        f"{int(same.all(axis=1).sum())} of {len(same)}",
    )


def speed_row(table: Table, windows: Windows, name: str) -> None:
    """The codec on one thread, over pages that come from memory."""
    pool = windows.pool
    grid, codec = whole_pages(pool), Int8Codec(str(pool.spec.dtype).removeprefix("torch."))
    pages = as_bytes(pool).reshape(pool.num_pages, grid.grain_bytes)
    coded = np.empty((len(pages), coded_bytes(grid, codec.dtype)), dtype=np.uint8)
    seconds: dict[str, float] = {}
    for what in ("encode", "decode"):
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for page, row in zip(pages, coded, strict=True):
                if what == "encode":
                    codec.encode(grid, page, row)
                else:
                    codec.decode(grid, row, page)
            best = min(best, time.perf_counter() - started)
        seconds[what] = best
    rates = [f"{pages.nbytes / seconds[what] / 1e9:.1f}" for what in ("encode", "decode")]
    table.add(name, f"{100 * coded.nbytes / pages.nbytes:.1f}", *rates)


def texts(tokenizer: Tokenizer, *, count: int, length: int) -> list[list[int]]:
    """Windows of the reference, spread over all of it."""
    topics = pydoc_data.topics.topics
    tokens = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)
    stride = len(tokens) // count
    if stride < length:
        raise SystemExit(f"{count} windows of {length} tokens are more than the text's {len(tokens)}; ask for fewer")
    return [tokens[start : start + length] for start in range(0, count * stride, stride)]


def main() -> None:
    parser = argparse.ArgumentParser(description="quality of 8-bit KV on the wire")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prefix", type=int, default=500, help="tokens whose KV is moved")
    parser.add_argument("--tokens", type=int, default=128, help="of text after each prefix, and of greedy tokens")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=1)
    add_report_options(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    length = arguments.prefix + arguments.tokens + 1
    windows_tokens = texts(Tokenizer.load(arguments.model), count=arguments.windows, length=length)
    quality = Table(
        title="What comes after a prefix of moved KV",
        columns=[
            "model, page size",
            "KV on the wire",
            "perplexity",
            "change (%)",
            "KL (nats)",
            "same likeliest token (%)",
            "greedy until first difference (%)",
            "greedy streams all equal",
        ],
    )
    errors = Table(
        title="Error of int8",
        columns=["model, page size", "of", "rms error / rms (%)", "largest error / largest number of its block"],
    )
    speed = Table(
        title="Codec, one thread",
        columns=["model, page size", "bytes (%)", "encode (GB/s stored)", "decode (GB/s stored)"],
    )
    for dtype in arguments.dtypes:
        model = load_model(arguments.model, dtype=dtype, num_threads=arguments.threads)
        for page_size in arguments.page_sizes:
            name = f"{dtype}, {page_size}"
            windows = Windows(model, windows_tokens, prefix=arguments.prefix, page_size=page_size)
            forms: dict[str, Rounding] = {"as stored": as_stored, "int8": as_int8}
            if dtype == "float32":
                forms["bfloat16"] = as_bfloat16
            stored: Quality | None = None
            expectations: list[torch.Tensor] = []
            for form, rounding in forms.items():
                print(f"{name}: {form}", file=sys.stderr)
                found = measure(windows, arguments.windows, rounding, num_greedy=arguments.tokens, stored=expectations)
                stored = stored or found
                compare(quality, name, form, found, stored)
            error_rows(errors, windows, name)
            speed_row(speed, windows, name)
    report = Report(
        name="wire-quality",
        purpose="What KV in 8 bits on the wire (transfer.wire_dtype: int8) costs in quality, beside KV as stored.",
        configuration={
            "model": arguments.model.name,
            "windows": f"{arguments.windows} of Python's language reference",
            "tokens": f"{arguments.prefix} of prefix with moved KV, {arguments.tokens} after it",
            "threads": arguments.threads,
        },
        tables=[quality, errors, speed],
    )
    finish(report, arguments)


if __name__ == "__main__":
    main()
