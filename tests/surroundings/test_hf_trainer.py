"""Hugging Face's Trainer on optimised models: losses, evaluations, predictions, checkpoints and trained weights of the model alone."""

import copy

import pytest
import torch
from small_steps import bert, llama, scattered, sentences, text
from transformers import Trainer, TrainingArguments

import fastpeft as fp

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]
ROWS = 8


def rows(kind):
    batch = text(ROWS, 9, seed=7) if kind == "llama" else sentences(ROWS, 9, seed=7)
    return [{name: values[i] for name, values in batch.items()} for i in range(ROWS)]


def adapted(kind):
    targets = ["q_proj", "v_proj", "down_proj"] if kind == "llama" else ["query", "value", "output.dense"]
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    return scattered(peft.get_peft_model(llama() if kind == "llama" else bert(), config), torch.float32)


def scores(prediction):
    """Reads logits and labels, as a user's metric does."""
    logits, labels = (torch.as_tensor(a) for a in (prediction.predictions, prediction.label_ids))
    logits = logits[:, :-1] if logits.dim() == 3 else logits
    labels = labels[:, 1:] if labels.dim() == 2 else labels
    return {"hits": float((logits.argmax(-1) == labels)[labels >= 0].float().mean()), "mean": float(logits.double().mean())}


def run(model, kind, folder, resume=None, metric=scores, **more):
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "seed": 1}
    given |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant"}
    data = rows(kind)
    args = TrainingArguments(output_dir=str(folder), **given | more)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:6], compute_metrics=metric)
    trainer.train(resume_from_checkpoint=resume)
    history = [
        {k: v for k, v in row.items() if k.split("_")[-1] in ("loss", "norm", "hits", "mean")} for row in trainer.state.log_history
    ]
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return trainer, history, trained


def compare(kind, tmp_path, close=1e-4, **more):
    """Two runs of the same steps: the model's own modules, and fused ones."""
    model = adapted(kind)
    fused = copy.deepcopy(model)
    fp.optimize(fused)
    _, want, theirs = run(model, kind, tmp_path / "theirs", **more)
    trainer, got, ours = run(fused, kind, tmp_path / "ours", **more)
    assert len(got) == len(want) and sum("loss" in row for row in want) >= 4
    for mine, their in zip(got, want):
        assert mine == pytest.approx(their, rel=close, abs=close)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=20 * close, atol=20 * close, msg=lambda m, name=name: f"{name}: {m}")
    return trainer, fused, model


SETTINGS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_accumulation_steps": 1},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "clipping": {"max_grad_norm": 0.01},
}


ENCODERS = ("plain", "evaluation", "checkpointing")


@pytest.mark.parametrize(("setting", "kind"), [*((name, "llama") for name in SETTINGS), *((name, "bert") for name in ENCODERS)])
def test_a_run(setting, kind, tmp_path):
    compare(kind, tmp_path, **SETTINGS[setting])


@pytest.mark.parametrize("kind", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_bf16(kind, tmp_path):
    """Each rounds in other places: over many steps, losses and norms of gradients are as near to the float32 run as the model's own."""

    def history(bf16, optimised):
        model = adapted(kind)
        if optimised:
            fp.optimize(model)
        _, found, _ = run(model, kind, tmp_path / f"{bf16}{optimised}", bf16=bf16, learning_rate=1e-6, max_steps=24)
        return torch.tensor([[row["loss"], row["grad_norm"]] for row in found if "grad_norm" in row], dtype=torch.float64)

    truth, theirs, ours = history(False, False), history(True, False), history(True, True)
    theirs, ours = (((found - truth) / truth).square().mean(0).sqrt() for found in (theirs, ours))
    assert len(truth) == 24 and (theirs > 1e-4).all() and (ours > 1e-4).all()  # both ran in bfloat16
    assert (ours <= 1.5 * theirs).all(), (ours, theirs)


@pytest.mark.parametrize("kind", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_prediction(kind, tmp_path):
    trainer, _, model = compare(kind, tmp_path, max_steps=4)
    theirs = Trainer(model, trainer.args, compute_metrics=scores).predict(rows(kind))
    ours = trainer.predict(rows(kind))
    torch.testing.assert_close(torch.as_tensor(ours.predictions), torch.as_tensor(theirs.predictions), rtol=1e-2, atol=1e-2)
    assert ours.metrics["test_loss"] == pytest.approx(theirs.metrics["test_loss"], rel=1e-3)


def test_resume_and_the_best_model(tmp_path):
    """Stopped after two steps and resumed, a run ends as one that was not; the best checkpoint comes back into the fused model."""
    keep = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    whole = adapted("llama")
    fp.optimize(whole)
    again = copy.deepcopy(whole)
    _, _, want = run(whole, "llama", tmp_path / "whole")
    run(copy.deepcopy(again), "llama", tmp_path / "two", max_steps=2, **keep)
    _, _, got = run(again, "llama", tmp_path / "two", resume=str(tmp_path / "two" / "checkpoint-2"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6)
    best = adapted("llama")
    fp.optimize(best)
    chosen = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}  # the best is not the last
    trainer, history, _ = run(best, "llama", tmp_path / "best", learning_rate=0.3, **chosen, **keep)
    losses = [row["eval_loss"] for row in history if "eval_loss" in row]
    assert max(losses) > losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(max(losses), rel=1e-5)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    """As Trainer's torch_compile does, with a backend that traces and compiles nothing."""
    _, fused, _ = compare("llama", tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert any(fp.optimize(fused).already_fused)
