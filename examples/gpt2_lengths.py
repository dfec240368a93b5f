"""Train a Hugging Face GPT-2 on texts of different lengths: the model gives its own loss, batches are padded.

The loader gives dicts, whose entries are the model's arguments; `loss_fn=None` takes the loss from the
model's output. Each batch is as long as its longest text: the sequence length is open in the captured graph.
Text is the language reference that ships with Python, byte by byte; weights are random.

    python examples/gpt2_lengths.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import dtrp


def paragraphs(longest: int) -> list[Tensor]:
    """The reference's paragraphs as bytes, cut where they are too long."""
    found = [p.strip() for name in sorted(topics) for p in topics[name].split("\n\n")]
    return [torch.tensor(bytearray(p.encode()[:longest])).long() for p in found if len(p) > 16]


def batches(texts: list[Tensor], size: int, count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Padded batches; neither attention nor loss looks at the padding."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = [texts[i] for i in torch.randint(len(texts), (size,), generator=generator).tolist()]
        pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        mask = pad([torch.ones_like(t) for t in chosen])
        labels = pad(chosen, padding_value=-100)
        yield {"input_ids": pad(chosen), "attention_mask": mask, "labels": labels}


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--longest", type=int, default=96, help="bytes of a text")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--executor", default="auto", choices=["auto", "inline", "workers"])
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256, n_positions=args.longest, n_embd=args.width, n_layer=args.depth, n_head=4,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    texts = paragraphs(args.longest)
    (example,) = batches(texts, 8, 1, seed=1)
    pipe = dtrp.compile(model, devices=["cpu"] * args.stages, example_inputs=example)
    print(pipe.report)

    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    with pipe.trainer(
        None, optimizer, executor=args.executor, max_grad_norm=1.0, seed=0, progress=True
    ) as trainer:
        trainer.fit(batches(texts, 8, args.steps, seed=0), epochs=1)
        held_out = trainer.evaluate(batches(texts, 8, 8, seed=2))
    print(f"nats per byte: {trainer.losses[0]:.2f} at first, {held_out['loss']:.2f} at the end")
    return trainer.losses


if __name__ == "__main__":
    main()
