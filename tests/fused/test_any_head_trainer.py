"""Hugging Face's Trainer around a language model whose loss is ours, against the same model as it was."""

import copy

import pytest
import torch
import transformers as T
from tiny_models import V, tiny

import fastpeft as fp
from fastpeft.fused.head import lazy_logits


class Answers(torch.utils.data.Dataset):
    """Texts of unequal lengths, padded on the right, of which the end is the answer."""

    def __init__(self):
        generator = torch.Generator().manual_seed(5)
        self.rows = []
        for length in (12, 7, 9, 10, 5, 12):
            ids, mask = torch.zeros(12, dtype=torch.long), torch.zeros(12, dtype=torch.long)
            ids[:length], mask[:length] = torch.randint(3, V, (length,), generator=generator), 1
            labels = torch.full((12,), -100)
            labels[length - length // 3 : length] = ids[length - length // 3 : length]
            self.rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def models(name, frozen_head=True, **options):
    plain, _ = tiny(name, torch.float32)
    if frozen_head:
        plain.get_input_embeddings().requires_grad_(False)
        plain.get_output_embeddings().requires_grad_(False)
    model = copy.deepcopy(plain)
    fp.optimize(model, lambda module, where: where == "", **options)
    return plain, model


def trainer(model, folder, **options):
    metrics = options.pop("compute_metrics", None)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_steps": 2, "learning_rate": 0.05} | options
    options |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "save_strategy": "no"}
    args = T.TrainingArguments(output_dir=str(folder), **options)
    return T.Trainer(model, args, train_dataset=Answers(), eval_dataset=Answers(), compute_metrics=metrics)


def history(run):
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("lean", [True, False])
def test_accumulation(name, lean, tmp_path, monkeypatch):
    """Batches of unequal numbers of labels, gathered: the loss counts them all (num_items_in_batch), and no logits are formed."""
    plain, model = models(name, lean_logits=lean)
    runs = [trainer(each, tmp_path) for each in (plain, model)]
    runs[0].train()
    monkeypatch.setattr(lazy_logits.LazyLogits, "read", lambda self: pytest.fail("logits were computed"))
    runs[1].train()
    assert history(runs[1]) == pytest.approx(history(runs[0]), rel=1e-4) and len(history(runs[0])) == 2
    for (name, p), q in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(q, p, rtol=0, atol=2e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_what_reads_logits(tmp_path):
    """Label smoothing takes the labels out and forms its own loss; evaluation and prediction read logits."""
    plain, model = models("mistral")
    scores = []

    def metrics(prediction):
        chosen, labels = prediction.predictions.argmax(-1)[:, :-1], prediction.label_ids[:, 1:]
        return {"accuracy": float((chosen == labels)[labels != -100].mean())}

    for each in (plain, model):
        run = trainer(each, tmp_path, label_smoothing_factor=0.1, compute_metrics=metrics)
        run.train()
        predicted = run.predict(Answers())
        scores.append((history(run), run.evaluate(), predicted.predictions, predicted.metrics["test_loss"]))
    (a, b, c, d), (e, f, g, h) = scores
    assert e == pytest.approx(a, rel=1e-4) and f["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-3) and h == pytest.approx(d, rel=1e-3)
    assert f["eval_accuracy"] == b["eval_accuracy"] and g.shape == c.shape == (6, 12, V)


def test_a_loss_of_the_callers_own(tmp_path):
    """compute_loss and compute_loss_func read the logits of a training step: they are there, with gradients."""

    class Mine(T.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            loss = outputs.loss + 0.01 * outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    losses = []
    for each in models("mistral"):
        run = trainer(each, tmp_path)
        run.__class__ = Mine
        run.train()
        losses.append(history(run))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_bfloat16_and_checkpointing(tmp_path):
    losses = []
    for each in models("mistral", frozen_head=False, lean_logits=True):
        run = trainer(each, tmp_path, bf16=True, gradient_checkpointing=True)
        run.train()
        losses.append(history(run))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
