"""Hugging Face's Trainer over a pipeline, beside the library's own, and beside a loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dtrp

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from dtrp.integrations.transformers import Loss, PipelineTrainer  # noqa: E402

EXACT = {"method": "bp", "executor": "inline"}
INLINE = {"executor": "inline"}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library's own warnings are its own."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def gpt2(*, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"vocab_size": 31, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **dropout, **options}))


def bert(*, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=31, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def texts(n: int = 14, seed: int = 3) -> list[dict[str, Any]]:
    """Of different lengths."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (n,), generator=g).tolist()
    return [{"input_ids": torch.randint(31, (length,), generator=g).tolist()} for length in lengths]


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """What a collator for language models gives: padding that neither attention nor loss looks at."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids, labels, mask = (torch.full((len(rows), longest), fill) for fill in (0, -100, 0))
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        ids[i, :n] = labels[i, :n] = torch.tensor(row["input_ids"])
        mask[i, :n] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def classes(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Of one length: BERT's code decides by it."""
    ids = torch.tensor([(row["input_ids"] * 3)[:12] for row in rows])
    return {"input_ids": ids, "labels": ids.sum(1) % 3}


def arguments(folder: Path, **options: Any) -> Any:
    usual = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "learning_rate": 0.02,
    }
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    return transformers.TrainingArguments(str(folder), **{**usual, **quiet, **options})


def trained(
    folder: Path, kind: Any, model: Callable[[], Any] = gpt2, collate: Any = padded, **options: Any
) -> Any:
    """A trainer that has trained."""
    own = {k: options.pop(k) for k in ("pipeline", "training") if k in options}
    given = {k: options.pop(k) for k in ("compute_loss_func", "optimizers", "eval_dataset") if k in options}
    resume = options.pop("resume", None)
    trainer = kind(
        model(), arguments(folder, **options), train_dataset=texts(), data_collator=collate, **own, **given
    )
    trainer.result = trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def sum_of_losses(output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = output.logits[:, :-1].flatten(0, 1)
    return (
        torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        / num_items_in_batch
    )


CASES: dict[str, dict[str, Any]] = {
    "accumulated, an incomplete group at the end": {"gradient_accumulation_steps": 2},
    "clipped, warmed up, decayed": {
        "max_grad_norm": 0.05, "warmup_steps": 3, "lr_scheduler_type": "cosine", "weight_decay": 0.1,
    },
    "momentum, a loss of its own": {"optim": "sgd", "compute_loss_func": sum_of_losses},
    "smoothed labels": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "no divided loss": {"model": bert, "collate": classes, "gradient_accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [c if i == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(CASES)]
)
def test_exact_training_equals_the_library(case: str, tmp_path: Path) -> None:
    """Losses, gradient norms and weights are the library's own single-device run's: arguments mean what they
    mean there, data come in the same order, an update is over the same batches."""
    mine = trained(tmp_path / "a", PipelineTrainer, pipeline={"n_gpus": 2}, training=EXACT, **CASES[case])
    theirs = trained(tmp_path / "b", transformers.Trainer, **CASES[case])
    for name in ("loss", "learning_rate", "grad_norm"):
        assert logged(mine, name) == pytest.approx(logged(theirs, name), rel=1e-4, abs=1e-6), name
    assert mine.result.training_loss == pytest.approx(theirs.result.training_loss, rel=1e-5)
    assert mine.state.global_step == theirs.state.global_step
    for a, b in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_noise_on_embeddings(tmp_path: Path) -> None:
    """The library's hook adds it, which was refused: in one stage the same noise as there, in two another."""
    options: dict[str, Any] = {"neftune_noise_alpha": 5.0, "optim": "sgd", "max_steps": 3}
    theirs = trained(tmp_path / "a", transformers.Trainer, **options)
    quiet = trained(tmp_path / "b", transformers.Trainer, optim="sgd", max_steps=3)
    runs = [
        trained(tmp_path / str(n), PipelineTrainer, pipeline={"n_gpus": n}, training=EXACT, **options)
        for n in (1, 2)
    ]
    assert logged(runs[0]) == pytest.approx(logged(theirs), rel=1e-6)
    assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(logged(runs[1]), logged(quiet), strict=True))
    for run in runs:
        assert not any(m._forward_hooks for m in run.model.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "updates", "optim"),
    [
        ("fp64", 50, "adamw_torch"),
        ("fp64", 50, "adafactor"),
        ("fp32", 25, "adamw_torch"),
        ("bf16", 50, "adamw_torch"),
    ],
)
def test_fifty_updates_equal_the_library(precision: str, updates: int, optim: str, tmp_path: Path) -> None:
    """In float64, with a loss in it (the library's own is in float32), as closely as losses are logged. In
    float32, fifty steps of AdamW make more than 1e-4 of last bits on some processors; and Adafactor blows
    last bits up in any precision: attention's bias of keys has a gradient of zero but for them, is divided by
    its own size, and by the size of all of that the other biases are scaled. So these are frozen there."""
    options: dict[str, Any] = {"max_steps": updates, "gradient_accumulation_steps": 2, "optim": optim}

    def in_double() -> Any:
        model = gpt2().double()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(optim != "adafactor" or not name.endswith("c_attn.bias"))
        return model

    if precision == "fp64":
        options |= {"model": in_double, "compute_loss_func": sum_of_losses}
    options["bf16"] = precision == "bf16"
    mine = trained(tmp_path / "a", PipelineTrainer, pipeline={"n_gpus": 2}, training=EXACT, **options)
    theirs = trained(tmp_path / "b", transformers.Trainer, **options)
    assert len(logged(mine)) == updates
    within = {"fp64": 1e-6, "fp32": 1e-4, "bf16": 0.02}[precision]
    assert logged(mine) == pytest.approx(logged(theirs), abs=within)


@pytest.mark.parametrize(
    ("executor", "fp16"),
    [("inline", False), ("inline", True), pytest.param("workers", False, marks=pytest.mark.slow)],
)
def test_decoupled_training_equals_a_loop_by_hand(executor: str, fp16: bool, tmp_path: Path) -> None:
    """The same bits as `Pipeline.trainer` with the settings that the arguments stand for."""
    seen: list[dict[str, Tensor]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.append(padded(rows))
        return seen[-1]

    mine = trained(
        tmp_path, PipelineTrainer, pipeline={"n_gpus": 2}, training={"executor": executor}, collate=collate,
        optim="adamw_torch", lr_scheduler_type="constant", gradient_accumulation_steps=2, max_grad_norm=1.0,
        fp16=fp16,
    )  # fmt: skip
    model = gpt2(use_cache=mine.model.config.use_cache)
    settings: dict[str, Any] = {"accumulate": 2, "max_grad_norm": 1.0, "seed": 42, "executor": "inline"}
    settings["autocast"] = torch.float16 if fp16 else None
    pipe = dtrp.compile(model, n_gpus=2)
    with pipe.trainer(Loss(None), partial(torch.optim.AdamW, lr=0.02, weight_decay=0.0), **settings) as t:
        for epoch in (seen[:7], seen[7:]):
            for i in range(0, 7, 2):
                group = epoch[i : i + 2]
                items = mine._get_num_items_in_batch(group, torch.device("cpu"))
                for b in group:
                    extra = {"scale": float(len(group)), "rows": 2}
                    t.step(**b, num_items_in_batch=items, target=b["labels"], extra=extra)
            t._run.drain(close_group=True)
    for name, p in model.state_dict().items():
        assert torch.equal(p, mine.model.state_dict()[name]), name


@pytest.mark.parametrize("fp16", [False, True])
def test_the_rate_that_is_logged_is_the_one_that_was_used(fp16: bool, tmp_path: Path) -> None:
    options = {"max_steps": 3, "lr_scheduler_type": "linear", "fp16": fp16}
    mine = trained(tmp_path, PipelineTrainer, pipeline={"n_gpus": 2}, training=EXACT, **options)
    assert logged(mine, "learning_rate") == pytest.approx([0.02, 0.02 * 2 / 3, 0.02 / 3])


def test_rates_that_a_callback_sets_are_refused(tmp_path: Path) -> None:
    """They are set on an optimizer that does not step: training would go on with others, without a word."""

    class Sets(transformers.TrainerCallback):  # type: ignore[name-defined,misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            given["optimizer"].param_groups[0]["lr"] = 0.5

    trainer = PipelineTrainer(
        gpt2(), arguments(tmp_path), train_dataset=texts(), data_collator=padded, callbacks=[Sets()],
        pipeline=2, training=EXACT,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"callback has set lr=0\.5 in group 0 .* where 0\.0\d+ is"):
        trainer.train()


def test_batches_without_labels_are_told(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return {name: value for name, value in padded(rows).items() if name != "labels"}

    with pytest.raises(TypeError, match="without a loss: let batches have labels"):
        trained(tmp_path, PipelineTrainer, collate=collate, pipeline={"n_gpus": 2}, training=INLINE)


def test_no_loss_is_logged_before_one_has_come(tmp_path: Path) -> None:
    """A NaN in the first line of a log looks like a run that has failed."""
    mine = trained(tmp_path, PipelineTrainer, pipeline={"n_gpus": 3}, training=INLINE, max_steps=5)
    assert len(logged(mine, "learning_rate")) == 5
    assert 0 < len(logged(mine)) < 5
    assert all(loss == loss for loss in logged(mine))


@pytest.mark.parametrize("saved_by", ["pipeline", pytest.param("library", marks=pytest.mark.slow)])
def test_resumes_from_the_librarys_checkpoints(saved_by: str, tmp_path: Path) -> None:
    """A run that stops after four updates and goes on equals one that goes through, by exact training; the
    library's own checkpoint will do, and the library resumes from ours."""
    options: dict[str, Any] = {
        "lr_scheduler_type": "linear", "gradient_accumulation_steps": 2,
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    kinds = {
        "pipeline": partial(PipelineTrainer, pipeline={"n_gpus": 2}, training=EXACT),
        "library": transformers.Trainer,
    }
    other = "library" if saved_by == "pipeline" else "pipeline"
    whole = trained(tmp_path / saved_by, kinds[saved_by], **options)
    checkpoint = str(tmp_path / saved_by / "checkpoint-3")
    resumed = trained(tmp_path / other, kinds[other], **options, resume=checkpoint)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert logged(resumed)[-5:] == pytest.approx(logged(whole)[-5:], rel=1e-4)
    for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_decoupled_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Optimizer, scheduler, counters of masks: with dropout and predicted weights."""
    model = partial(gpt2, resid_pdrop=0.1)
    options: dict[str, Any] = {
        "pipeline": {"n_gpus": 2}, "training": {**INLINE, "predictor": "difference"}, "model": model,
        "save_strategy": "steps", "save_steps": 4, "num_train_epochs": 1,
    }  # fmt: skip
    whole = trained(tmp_path, PipelineTrainer, **options)
    resumed = trained(tmp_path / "b", PipelineTrainer, **options, resume=str(tmp_path / "checkpoint-4"))
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_evaluates_saves_and_loads(tmp_path: Path) -> None:
    """Evaluation in the middle is the library's, over the stages, with the newest weights; what is saved
    loads into the plain model."""
    options: dict[str, Any] = {"eval_strategy": "epoch", "eval_dataset": texts(6, seed=5)}
    mine = trained(tmp_path / "a", PipelineTrainer, pipeline={"n_gpus": 2}, training=EXACT, **options)
    theirs = trained(tmp_path / "b", transformers.Trainer, **options)
    assert logged(mine, "eval_loss") == pytest.approx(logged(theirs, "eval_loss"), rel=1e-4)
    assert len(logged(mine, "eval_loss")) == 2
    mine.save_model(str(tmp_path / "saved"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    for name, p in loaded.state_dict().items():
        assert torch.equal(p, mine.model.state_dict()[name]), name
    assert mine.evaluate()["eval_loss"] == pytest.approx(logged(mine, "eval_loss")[1], rel=1e-5)


def test_a_second_call_of_train_has_the_optimizers_state(tmp_path: Path) -> None:
    """As the library's has: it began anew, without a word."""
    options: dict[str, Any] = {"max_steps": 3, "lr_scheduler_type": "constant"}
    mine = trained(tmp_path / "a", PipelineTrainer, pipeline=2, training=EXACT, **options)
    theirs = trained(tmp_path / "b", transformers.Trainer, **options)
    for trainer in (mine, theirs):
        assert {len(trainer.optimizer.state[p]) for p in trainer.model.parameters()} == {3}
        trainer.train()
    assert logged(mine) == pytest.approx(logged(theirs), rel=1e-4)
    assert len(logged(mine)) == 3  # of the second call


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"gradient_checkpointing": True}, {}, r"checkpointing=True\): stages recompute by themselves"),
    ({"auto_find_batch_size": True}, {}, "choose a batch size"),
    ({}, {"training": {"accumulate": 2}}, "accumulate comes from gradient_accumulation_steps"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}, {}, "steps on a metric"),
]


@pytest.mark.parametrize(("options", "given", "message"), REFUSED, ids=lambda v: str(v)[:30])
def test_what_cannot_be_honoured_is_refused(
    options: dict[str, Any], given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        trained(tmp_path, PipelineTrainer, pipeline={"n_gpus": 2}, eval_dataset=texts(2), **given, **options)


class Weighted(PipelineTrainer):
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return 2 * model(**inputs).loss


class Cast(PipelineTrainer):
    def compute_loss_context_manager(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


class Calls(PipelineTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        return model(**inputs).loss


class Alone(PipelineTrainer):
    def training_step(self, model: Any, inputs: Any, *args: Any) -> Tensor:
        loss: Tensor = self.model(**inputs).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Weighted, r"Weighted overrides compute_loss, .*compute_loss_func="),
        (Cast, "Cast overrides compute_loss_context_manager, .*: let the model's forward enter it"),
        (Calls, r"training_step of a subclass calls the model, .* super\(\)\.training_step"),
        (Alone, r"Alone\.training_step trains by itself: the stages got no batch"),
    ],
)
def test_what_a_subclass_does_instead_is_refused(kind: Any, message: str, tmp_path: Path) -> None:
    """Otherwise something else would be trained, or nothing, without a word."""
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, kind, pipeline=2, training=EXACT)


@pytest.mark.slow
def test_inputs_that_a_subclass_prepares(tmp_path: Path) -> None:
    """The stages got the loader's own, without a word."""

    def shifted(self: Any, inputs: Any) -> Any:
        inputs = transformers.Trainer._prepare_inputs(self, inputs)
        return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 31}

    options: dict[str, Any] = {"max_steps": 3, "optim": "sgd"}
    kinds = [
        type("Shifted", (k,), {"_prepare_inputs": shifted}) for k in (PipelineTrainer, transformers.Trainer)
    ]
    mine = trained(tmp_path / "a", kinds[0], pipeline=2, training=EXACT, **options)
    theirs = trained(tmp_path / "b", kinds[1], **options)
    assert logged(mine) == pytest.approx(logged(theirs), rel=1e-4)


@pytest.mark.slow
def test_an_epoch_that_ends_within_an_update(tmp_path: Path) -> None:
    """Of unknown length: the library adds what is left over to the next update; stages paired it with the
    next batch, and all later ones with the wrong ones."""

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(texts())

    def train(folder: Path, **options: Any) -> Any:
        options = {"max_steps": 8, "optim": "sgd", "gradient_accumulation_steps": 2, **options}
        kind, own = options.pop("kind", PipelineTrainer), {"pipeline": 2, "training": EXACT}
        own = own if kind is PipelineTrainer else {}
        trainer = kind(
            gpt2(), arguments(folder, **options), train_dataset=Stream(), data_collator=padded, **own
        )
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match="an epoch ended after 1 of the 2 batches of an update"):
        train(tmp_path)
    ways = [
        train(tmp_path / k.__name__, kind=k, max_steps=3) for k in (PipelineTrainer, transformers.Trainer)
    ]
    for a, b in zip(*(t.model.parameters() for t in ways), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_loader_that_accelerate_made(tmp_path: Path) -> None:
    """A loop of one's own needs no more of accelerate."""
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    loader = DataLoader(texts(), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
    losses = []
    for given in (loader, Accelerator(cpu=True).prepare(loader)):
        with dtrp.compile(gpt2(), n_gpus=2).trainer(
            None, partial(torch.optim.AdamW, lr=0.02), method="bp", executor="inline"
        ) as t:
            t.fit(given, 1)
            losses.append(t.losses)
    assert losses[0] == losses[1]
