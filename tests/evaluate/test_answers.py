"""Answers: in the data set's order, each as if it were asked alone, and the model left as it was."""

import pytest
import torch

from fastpeft.data import VQACollator, VQADataset, decode
from fastpeft.device import choose_device, to_device
from fastpeft.evaluate import answer_questions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def trained(runs, phantoms):
    """A model that has seen enough to give different answers, and the training questions."""
    trainer = runs.trainer(phantoms, "T/T/T", samples=24, steps=120, batch_size=12, base_learning_rate=5e-3)
    trainer.fit()
    return trainer


def ask(trainer, samples=None, **options):
    dataset = VQADataset(samples or trainer.dataset.samples, trainer.dataset.preprocess)
    return answer_questions(trainer.model, dataset, trainer.dataset.tokenizer, **{"progress": False} | options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_answers_come_in_the_data_sets_order_and_do_not_depend_on_the_batch(trained):
    answers = ask(trained)
    assert len(set(answers)) > 3
    assert ask(trained, batch_size=7) == answers
    samples = trained.dataset.samples
    assert ask(trained, list(reversed(samples))) == answers[::-1]
    assert [ask(trained, [sample])[0] for sample in samples[:6]] == answers[:6]


def test_the_model_is_left_as_it_was(trained):
    before = state(trained.model)
    for training in (True, False):
        trained.model.train(training)
        ask(trained, trained.dataset.samples[:4])
        assert trained.model.training is training
    after = state(trained.model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    trained.model.train()
    with pytest.raises(ValueError, match="batch_size=0"):
        ask(trained, batch_size=0)
    assert trained.model.training


def test_one_beam_is_greedy(trained):
    """Each token the likeliest after those before it."""
    model, tokenizer = trained.model.eval(), trained.dataset.tokenizer
    batch = to_device(VQACollator(tokenizer)([trained.dataset[0]]), ("input_ids", "attention_mask", "pixel_values"), "cpu", torch.float32)
    ids = [tokenizer.bos_token_id]
    with torch.no_grad():
        image = model.encode_images(batch["pixel_values"])
        question = model.encode_questions(batch["input_ids"], batch["attention_mask"], image)
        while ids[-1] != tokenizer.sep_token_id and len(ids) < 10:
            said = model.text_decoder(torch.tensor([ids]), encoder_hidden_states=question, encoder_attention_mask=batch["attention_mask"])
            ids.append(int(said.logits[0, -1].argmax()))
    assert ask(trained, trained.dataset.samples[:1], num_beams=1) == decode(tokenizer, [ids])


def test_bfloat16_models_answer(runs, phantoms):
    trainer = runs.trainer(phantoms, steps=1, dtype="bf16")
    assert len(ask(trainer, trainer.dataset.samples[:5])) == 5


def test_what_a_model_is_given():
    batch = {"ids": torch.ones(2, dtype=torch.int64), "pixels": torch.ones(2), "absent": None}
    moved = to_device(batch, ("ids", "pixels", "absent", "unknown"), torch.device("cpu"), torch.bfloat16)
    assert {name: t.dtype for name, t in moved.items()} == {"ids": torch.int64, "pixels": torch.bfloat16}


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device 'tpu!' cannot be used here") as error:
        choose_device("tpu!")
    assert "\n" not in str(error.value)
