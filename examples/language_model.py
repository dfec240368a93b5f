"""A small GPT with tied embedding and head, on the text that ships with Python, against plain training.

The text is the language reference that ``help()`` prints (``pydoc_data.topics``), read as bytes. The token
embedding lies in the first stage and, as the output head, in the last one too: both hold a copy, each
update uses the sum of both gradients, so the copies stay the same bits.

    python examples/language_model.py
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import dtrp

VOCABULARY = 256  # bytes


class Block(nn.Module):
    """Pre-norm transformer block with causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Decoder-only transformer; the token embedding is the output head as well."""

    def __init__(self, width: int = 96, depth: int = 4, heads: int = 4, context: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def text() -> tuple[Tensor, Tensor]:
    """The reference's bytes: the first nine tenths to train on, the rest to validate."""
    content = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(bytearray(content)).long()
    border = len(data) * 9 // 10
    return data[:border], data[border:]


def batch(data: Tensor, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows ``(size, context)`` of the text and, as target, the same moved on by one byte."""
    starts = torch.randint(len(data) - context, (size, 1), generator=generator)
    windows = data[starts + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def next_byte_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy per byte, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@torch.no_grad()
def validate(model: nn.Module, data: Tensor, context: int) -> float:
    """Loss per byte of the plain model on the first 256 windows of ``data``."""
    model.eval()
    windows = data[: 256 * context + 1]
    inputs, target = windows[:-1].view(256, context), windows[1:].view(256, context)
    return float(next_byte_loss(model(inputs), target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--method", default="dtrp", choices=["dtrp", "dtr", "bp"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train, validation = text()
    print(f"{len(train):,} bytes to train on, {len(validation):,} to validate")
    optimizer = partial(torch.optim.AdamW, lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)

    def scheduler(target: torch.optim.Optimizer) -> LambdaLR:
        def factor(update: int) -> float:
            cosine = 0.5 * (1 + math.cos(math.pi * min(update, args.steps) / args.steps))
            return min(1.0, (update + 1) / (0.1 * args.steps)) * cosine

        return LambdaLR(target, factor)

    def fresh() -> tuple[GPT, torch.Generator]:
        torch.manual_seed(args.seed)
        model = GPT(args.width, args.depth, context=args.context)
        return model, torch.Generator().manual_seed(args.seed)

    plain, generator = fresh()
    plain_optimizer = optimizer(plain.parameters())
    plain_scheduler = scheduler(plain_optimizer)
    plain_losses = []
    start = time.perf_counter()
    for _ in tqdm(range(args.steps), desc="plain", unit="step"):
        x, y = batch(train, args.batch_size, args.context, generator)
        plain_optimizer.zero_grad()
        loss = next_byte_loss(plain(x), y)
        loss.backward()
        plain_optimizer.step()
        plain_scheduler.step()
        plain_losses.append(loss.item())
    plain_seconds = time.perf_counter() - start

    model, generator = fresh()
    example = torch.zeros(args.batch_size, args.context, dtype=torch.long)
    pipe = dtrp.compile(
        model,
        n_gpus=args.stages,
        example_inputs=example,
        devices=["cpu"] * args.stages,  # a worker process each
        recompute=True,  # as DTRP does it; "auto" would trade memory for time where memory allows
    )
    print(pipe.report)
    start = time.perf_counter()
    with pipe.trainer(
        loss_fn=next_byte_loss,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        method=args.method,
        seed=args.seed,
    ) as trainer:
        for _ in tqdm(range(args.steps), desc=f"{args.method}, {args.stages} stages", unit="step"):
            trainer.step(*batch(train, args.batch_size, args.context, generator))
        trainer.flush()
        losses = list(trainer.losses)
    seconds = time.perf_counter() - start
    assert model.head.weight is model.tokens.weight

    print(f"\n{'training loss, nats per byte':32} {'plain':>8} {args.method:>8}")
    window = max(1, args.steps // 8)
    for first in range(0, args.steps, window):
        part = slice(first, first + window)
        steps = f"steps {first + 1} to {min(first + window, args.steps)}"
        means = [sum(values[part]) / len(values[part]) for values in (plain_losses, losses)]
        print(f"{steps:32} {means[0]:8.3f} {means[1]:8.3f}")
    scores = [validate(network, validation, args.context) for network in (plain, model)]
    print(f"{'validation':32} {scores[0]:8.3f} {scores[1]:8.3f}")
    print(f"{'seconds':32} {plain_seconds:8.1f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
