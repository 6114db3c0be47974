"""A LightningModule around an optimised model: losses and trained weights of the model alone. Run by `make test-trainers`."""

import copy

import pytest
import torch
from small_steps import SINGLE, llama, same, scattered, text

import fastpeft as fp

lightning = pytest.importorskip("pytorch_lightning", reason="make test-trainers has Lightning")
peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


class Tuned(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.seen.append(loss.detach())
        return loss

    def validation_step(self, batch, index):
        output = self.model(**batch)
        self.log("val_loss", output.loss)
        self.log("mean_logit", output.logits.mean())

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("more", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=["plain", "accumulated, clipped"])
def test_fit_and_resume(more, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = scattered(peft.get_peft_model(llama(), config), torch.float32)
    fused = copy.deepcopy(model)
    fp.optimize(fused)
    batches, few = (torch.utils.data.DataLoader([text(seed=seed) for seed in range(n)], batch_size=None) for n in (4, 2))
    found, quiet = [], {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    for one in (model, fused):
        module = Tuned(one)
        trainer = lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **quiet, **more)
        trainer.fit(module, batches, few)
        scores = dict(trainer.callback_metrics)
        trained = {n: p.detach().clone() for n, p in one.named_parameters() if p.requires_grad}
        found.append({"loss": torch.stack(module.seen), **scores, **trained})
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    same(found[1], found[0], **{name: 20 * value for name, value in SINGLE.items()})
    again = Tuned(copy.deepcopy(model))
    fp.optimize(again.model)
    lightning.Trainer(max_epochs=2, default_root_dir=tmp_path, **quiet, **more).fit(again, batches, ckpt_path=tmp_path / "last.ckpt")
    for name, p in again.model.named_parameters():
        torch.testing.assert_close(p, dict(fused.named_parameters())[name], rtol=0, atol=0)
