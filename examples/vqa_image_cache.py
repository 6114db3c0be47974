"""Visual question answering with a Qwen2.5-VL and LoRA: the frozen image encoder runs once per image, however often it is asked about.

`optimize(model, cache_images="1GB")` keeps the encoder's outputs in memory; a folder keeps them from run to run. It is exact: an image is
known by its content, and where the encoder trains or draws random numbers nothing is kept, and the report says why.
"""

import argparse
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

import fastpeft

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a transformers folder of a Qwen2.5-VL; default: a small one with random weights")
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--cache", default="1GB", help="a size of memory, or a folder")
options = parser.parse_args()

torch.manual_seed(0)
if options.model:
    model = AutoModelForImageTextToText.from_pretrained(options.model)
else:
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    seen = {"depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "patch_size": 14, "out_hidden_size": 64}
    special = {"image_token_id": 190, "video_token_id": 191, "vision_start_token_id": 192, "vision_end_token_id": 193}
    text_config = size | {"vocab_size": 200, "rope_parameters": rope, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    vision_config = seen | {"fullatt_block_indexes": [3]}
    model = AutoModelForImageTextToText.from_config(Qwen2_5_VLConfig(text_config=text_config, vision_config=vision_config, **special))
# the language model alone: adapters in the image encoder would change what it computes
model = get_peft_model(model, LoraConfig(r=8, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM"))
report = fastpeft.optimize(model, cache_images=options.cache)
print(*report.notes, sep="\n")

# A data set of two images and three questions about each, as a processor prepares it: patches, their grid, image tokens in the text.
vision, generator = model.config.vision_config, torch.Generator().manual_seed(0)
grid = torch.tensor([[1, 4, 4]])  # one frame of 4 x 4 patches, merged by 2 x 2 into 4 image tokens
patch = 3 * vision.temporal_patch_size * vision.patch_size**2
images = [torch.randn(16, patch, generator=generator) for _ in range(2)]


def sample(image: int, question: int) -> dict[str, torch.Tensor]:
    """An image, a question of six words and an answer of two."""
    words = torch.randint(10, 180, (8,), generator=torch.Generator().manual_seed(10 * image + question))
    ids = torch.cat([torch.tensor([model.config.vision_start_token_id, *[model.config.image_token_id] * 4]), words])
    labels = ids.clone()
    labels[:-2] = -100
    types = (ids == model.config.image_token_id).int()
    row = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    return {name: value[None] for name, value in row.items()} | {"pixel_values": images[image], "image_grid_thw": grid}


samples = [sample(image, question) for question in range(3) for image in range(2)]
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
model.train()
for epoch in range(options.epochs):
    start, losses = time.perf_counter(), []
    for batch in samples:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f} in {time.perf_counter() - start:.2f} s")
