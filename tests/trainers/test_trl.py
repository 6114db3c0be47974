"""TRL's SFTTrainer on optimised models: losses, its own metrics and trained weights of the model alone. Run by `make test-trainers`."""

import copy

import pytest
import torch
from small_steps import llama, scattered

import fastpeft as fp

trl = pytest.importorskip("trl", reason="make test-trainers has trl")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
WORDS = "what is shown here a scan of the chest no lesion left right lung heart yes and in it"


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = ["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TEXTS = [
    {"text": "what is shown here a scan of the chest no lesion"},
    {"text": "is it left lung yes"},
    {"text": "the heart is in the chest and the left lung is here"},
    {"text": "no lesion"},
] * 2
PAIRS = [
    {"prompt": "what is shown here", "completion": " a scan of the chest"},
    {"prompt": "is it the left lung", "completion": " yes"},
    {"prompt": "what is in the chest", "completion": " heart and lung"},
    {"prompt": "lesion", "completion": " no lesion in the right lung"},
] * 2


def run(model, tokenizer, folder, rows, **more):
    given = {"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "seed": 1}
    given |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "bf16": False, "max_length": 16, "warmup_steps": 0}
    import datasets

    args = trl.SFTConfig(output_dir=str(folder), **given | more)
    trainer = trl.SFTTrainer(model, args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    history = [{k: row[k] for k in names if k in row} for row in trainer.state.log_history if "loss" in row]
    return history, {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


SETTINGS = {
    "padded": (TEXTS, {}),
    "packed": (TEXTS, {"packing": True}),
    "packed, wrapped": (TEXTS, {"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": (TEXTS, {"padding_free": True, "max_length": None}),
    "completion only": (PAIRS, {}),
    "prompts too": (PAIRS, {"completion_only_loss": False}),
    "completion only, accumulated": (PAIRS, {"gradient_accumulation_steps": 2}),
    "completion only, packed": (PAIRS, {"packing": True}),
    "checkpointing": (TEXTS, {"gradient_checkpointing": True}),
    "dft": (TEXTS, {"loss_type": "dft"}),
}


@pytest.mark.parametrize(("setting", "attention"), [*((name, "sdpa") for name in SETTINGS), ("packed", "eager"), ("padding-free", "eager")])
def test_a_run(setting, attention, tokenizer, tmp_path):
    rows, more = SETTINGS[setting]
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = scattered(peft.get_peft_model(llama(attn_implementation=attention), config), torch.float32)
    fused = copy.deepcopy(model)
    assert fp.optimize(fused).swapped
    want, theirs = run(model, tokenizer, tmp_path / "theirs", rows, **more)
    got, ours = run(fused, tokenizer, tmp_path / "ours", rows, **more)
    assert len(want) == 4 and {"loss", "grad_norm"} <= want[0].keys()
    for mine, their in zip(got, want):
        assert mine == pytest.approx(their, rel=1e-3, abs=1e-4)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}")
