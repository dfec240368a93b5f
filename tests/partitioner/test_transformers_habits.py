"""What people do to a transformers model before they train it: exact training equals the plain loop's."""

import copy
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn

import dtrp
from tests.sweeps import sweep

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def gpt2():
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES)
    return transformers.GPT2LMHeadModel(config)


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(intermediate_size=32, **SIZES))


def t5():
    """Its position biases are zeros that ask for gradients, also where none are computed."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 50}
    config = transformers.T5Config(dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config)


def checkpointed(m):
    """The cache that it returns without gradients is empty then."""
    name = "activation_checkpointing_enable"  # before version 5.24: gradient_...
    getattr(m, name if hasattr(m, name) else "gradient_checkpointing_enable")()


def checkpointed_with_a_new_head(m):
    m.requires_grad_(False)
    m.lm_head.weight = nn.Parameter(m.lm_head.weight.detach().clone())
    checkpointed(m)
    m.enable_input_require_grads()


def called_for_hidden_states(m):
    """Which leaves hooks on its layers."""
    m(torch.randint(3, 50, (2, 8)), output_hidden_states=True)


def with_hidden_states(m):
    m.config.output_hidden_states = True


def with_attentions(m):
    m.set_attn_implementation("eager")
    m.config.output_attentions = True


def after_generating(m):
    m.generate(torch.randint(3, 50, (1, 4)), max_new_tokens=2, do_sample=False)


def with_more_words(m):
    m.resize_token_embeddings(60)


HABITS = [
    checkpointed,
    with_hidden_states,
    with_attentions,
    after_generating,
    called_for_hidden_states,
    checkpointed_with_a_new_head,
    with_more_words,
]
# What was wrong once is tried every time, all else if slow.
FAST = [
    (checkpointed, gpt2, "inline"),
    (checkpointed, t5, "inline"),
    (with_hidden_states, llama, "workers"),
    (called_for_hidden_states, gpt2, "workers"),
]
ALL = [(checkpointed, t5, "workers"), *product(HABITS, [gpt2, llama], ["inline", "workers"])]


@pytest.mark.parametrize(
    ("habit", "make", "executor"), sweep([*FAST, *(one for one in ALL if one not in FAST)], len(FAST))
)
def test_trained_alike(habit, make, executor):
    """Refused were: checkpointing in GPT-2 ("an object of type DynamicCache"); with worker processes, hooks
    that hold a context variable, and hidden states, of which transformers' registry there knew nothing."""
    torch.manual_seed(0)
    model = make()
    habit(model)
    model.train()
    plain = copy.deepcopy(model)
    batches = [torch.randint(3, 50, (4, length)) for length in (8, 11, 9)]
    sgd = partial(torch.optim.SGD, lr=0.1)
    pipe = dtrp.compile(model, devices=["cpu"] * 2)
    with pipe.trainer(None, sgd, method="bp", executor=executor) as trainer:
        for tokens in batches:
            trainer.step(input_ids=tokens, labels=tokens)
    optimizer, losses = sgd([p for p in plain.parameters() if p.requires_grad]), []
    for tokens in batches:
        loss = plain(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trainer.losses == pytest.approx(losses, rel=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("training", [True, False])
def test_each_call_gives_an_empty_cache_of_its_own(training):
    model = gpt2()
    checkpointed(model)
    model.train(training)
    tokens = torch.randint(3, 50, (2, 8))
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=(tokens,))
    with torch.no_grad():
        one, other, plain = pipe(tokens), pipe(tokens), model(tokens)
    assert torch.equal(one.logits, plain.logits)
    assert type(one.cache) is type(plain.cache)
    assert one.cache.get_seq_length() == plain.cache.get_seq_length() == (0 if training else 8)
    one.cache.layers.clear()
    assert len(other.cache.layers) == len(plain.cache.layers) == 3
