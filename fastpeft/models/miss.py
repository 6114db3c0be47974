"""MISS: transformers' BlipForQuestionAnswering with the official model's numbers, loss and padding.

Source: Chen et al., MISS (arXiv 2401.05163) and its code. What the official model has and BlipConfig's defaults do not: 480 px,
12 text heads, vision norms with eps 1e-6, text dropout 0.1, drop-path up to 0.1 in the vision encoder, label smoothing 0.1; the loss
is summed over an answer's tokens and averaged over samples; a question's padding is masked in the decoder.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForQuestionAnswering, BlipTextConfig
from transformers.models.blip.modeling_blip import BlipTextVisionModelOutput
from transformers.utils import can_return_tuple

from fastpeft.fused.head.models import FusedBlipTextLMHeadModel, reads_of
from fastpeft.fused.stack.blip import FusedBlipTextModel
from fastpeft.labels import IGNORE_INDEX
from fastpeft.methods import Part
from fastpeft.models.family import Family
from fastpeft.models.parts import FrozenEvaluates
from fastpeft.ops._common import to_device_async

DROP_PATH = 0.1

PARTS = (
    Part(
        "vit",
        "vision_model",
        lora=("qkv", "projection", "fc1", "fc2", "patch_embedding"),
        ia3=("fc2",),
        ia3_feedforward=("fc2",),
        attention=("self_attn",),
        ffn=("mlp",),
    ),
    *(
        Part(
            name,
            path,
            lora=("query", "value"),
            ia3=("key", "value", "output.dense"),
            ia3_feedforward=("output.dense",),
            attention=("attention", "crossattention"),
            ffn=r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense",  # not the attention's output.dense
            prefix_host=host,
            peft_task=task,
        )
        for name, path, host, task in (
            ("jtm", "text_encoder", "", "FEATURE_EXTRACTION"),
            ("dec", "text_decoder", "bert", "CAUSAL_LM"),
        )
    ),
)


FULL = {"image_size": 480, "patch_size": 16, "vocab_size": 30_524, "hidden_size": 768, "heads": 12, "vision_layers": 12, "text_layers": 12}
# 64 pixels, for tests and the demo; no dropout: so small a model, trained for minutes, underfits with it
TINY = {"image_size": 64, "patch_size": 8, "vocab_size": 512, "hidden_size": 128, "heads": 4, "vision_layers": 4, "text_layers": 3}
# 1 / sqrt(width): BERT's 0.02 is for widths of 768. Positions of its size drown among patches: with 0.5 a classifier of this shape reached
# 0.82 after 1,000 steps on phantoms, with 0.02 0.56 after 750
TINY |= {"initializer_range": 0.08, "position_range": 0.5}
TINY |= {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}


def miss_config(*, tiny: bool = False, **overrides) -> BlipConfig:
    """The official MISS (or its ``tiny`` sibling) as a BlipConfig. ``overrides``: keys of FULL, drop_path_rate, or BlipTextConfig's."""
    known = FULL.keys() | {"drop_path_rate", "position_range"} | BlipTextConfig().to_dict().keys()
    if unknown := sorted(set(overrides) - known):
        raise ValueError(f"a MISS has no {', '.join(unknown)}; overrides are {', '.join(FULL)}, drop_path_rate or BlipTextConfig's")
    given = (TINY if tiny else FULL) | overrides
    image_size, patch_size, vocab_size, hidden_size, heads = (given.pop(k) for k in list(FULL)[:5])
    vision_layers, text_layers = given.pop("vision_layers"), given.pop("text_layers")
    drop_path_rate, position_range = given.pop("drop_path_rate", DROP_PATH), given.pop("position_range", 0.02)
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "encoder_hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": text_layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "label_smoothing": 0.1,
        "pad_token_id": 0,
        "bos_token_id": vocab_size - 2,  # [DEC]
        "sep_token_id": 102 if vocab_size > 30_000 else 3,
        "eos_token_id": 102 if vocab_size > 30_000 else 3,
        "projection_dim": hidden_size,
    }
    vision_config = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_hidden_layers": vision_layers,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_attention_heads": heads,
        "layer_norm_eps": 1e-6,
        "projection_dim": hidden_size,
        "drop_path_rate": drop_path_rate,
        "initializer_range": given.get("initializer_range", 0.02),  # transformers' default here is 1e-10: an encoder of zeros
        "position_range": position_range,
    }
    return BlipConfig(text_config=text_config | given, vision_config=vision_config, projection_dim=hidden_size)


class MissForQuestionAnswering(FrozenEvaluates, BlipForQuestionAnswering):
    """BlipForQuestionAnswering whose loss, masks and training behaviour are the official MISS's.

    Beyond transformers' arguments, ``forward`` takes ``image_index`` [B]: sample b asks about ``pixel_values[image_index[b]]``, so that
    an image shared by several questions is encoded once; and, where they are known, ``image_embeds`` [U, N, C] in place of pixels, or
    ``question_states`` [B, M, C] in place of all that is asked: neither the image encoder nor the question encoder then runs.
    """

    # HF Trainer counts label tokens, and this loss is a mean over samples: Trainer divides it by the number of accumulated batches instead
    accepts_loss_kwargs = False
    lean_logits = False  # whether nobody reads the logits of a training step

    def __init__(self, config: BlipConfig):
        super().__init__(config)
        nn.init.trunc_normal_(self.vision_model.embeddings.position_embedding, std=getattr(config.vision_config, "position_range", 0.02))
        last = getattr(config.vision_config, "drop_path_rate", 0.0)
        vision = self.vision_model.encoder.layers
        for i, layer in enumerate(vision):  # grows linearly with depth, from 0 to the configured rate
            for branch in (layer.self_attn, layer.mlp):
                branch.register_forward_hook(DropPath(last * i / max(1, len(vision) - 1)))

    def encode_images(self, pixel_values: Tensor, **kwargs) -> Tensor:
        """[U, 3, S, S] -> [U, 1 + patches, C]."""
        return self.vision_model(pixel_values=pixel_values, **kwargs).last_hidden_state

    def encode_questions(
        self, input_ids: Tensor, attention_mask: Tensor | None, image_embeds: Tensor, image_index: Tensor | None = None, **kwargs
    ) -> Tensor:
        """Question states [B, M, C]; an image has no padding, so nothing is masked there. Nobody reads states of padding, as the decoder
        attends to none: they may be zero."""
        kwargs |= reads_of(self.text_decoder)
        if image_index is not None and isinstance(self.text_encoder, FusedBlipTextModel):
            kwargs["encoder_index"] = image_index
        elif image_index is not None:
            image_embeds = image_embeds[to_device_async(image_index, image_embeds.device)]
        return self.text_encoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds, **kwargs
        ).last_hidden_state

    @property
    def host_inputs(self) -> tuple[str, ...]:
        """Of forward's tensors, those that are best left on the host: nobody then waits for the device."""
        fused = isinstance(self.text_encoder, FusedBlipTextModel) and isinstance(self.text_decoder, FusedBlipTextLMHeadModel)
        return ("attention_mask", "decoder_attention_mask", "labels", "image_index") if fused else ()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        image_embeds: Tensor | None = None,
        question_states: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> BlipTextVisionModelOutput:
        """input_ids [B, M] with [ENC] first; labels [B, L] = the answer's tokens with [DEC] first and padding -100; question_states
        [B, M, C]: what encode_questions() made of the questions, whose attention_mask [B, M] is still wanted.

        ``loss``: cross entropy of each answer's next tokens with label smoothing, summed over tokens, averaged over samples;
        ``num_items_in_batch``, the samples of all batches whose gradients are accumulated, divides the sum in place of this batch's own.
        ``hidden_states`` and ``attentions`` are the image encoder's, where output_hidden_states or output_attentions asks for them.
        """
        if labels is None and decoder_input_ids is None:
            raise ValueError("give labels (training) or decoder_input_ids; to answer questions call generate()")
        if decoder_input_ids is None:
            decoder_input_ids = labels.masked_fill(labels == IGNORE_INDEX, self.decoder_pad_token_id)
        if decoder_attention_mask is None and labels is not None:
            decoder_attention_mask = labels != IGNORE_INDEX
        seen = None
        if question_states is None:
            if input_ids is None or (pixel_values is None) == (image_embeds is None):
                raise ValueError(
                    "give input_ids with pixel_values, or with image_embeds that encode_images() made of them, or question_states alone"
                )
            if image_embeds is None:
                seen = self.vision_model(pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
                image_embeds = seen.last_hidden_state
            question_states = self.encode_questions(input_ids, attention_mask, image_embeds, image_index, **kwargs)
        else:
            asked = {"input_ids": input_ids, "pixel_values": pixel_values, "image_embeds": image_embeds, "image_index": image_index}
            _check_question_states(question_states, attention_mask, len(decoder_input_ids), asked)
        if decoder_input_ids.shape[1] > (room := self.config.text_config.max_position_embeddings):
            raise ValueError(f"an answer of {decoder_input_ids.shape[1]} tokens, and the decoder has {room} positions")
        answer = self.text_decoder(
            input_ids=to_device_async(decoder_input_ids, question_states.device),
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=question_states,
            encoder_attention_mask=attention_mask,
            labels=labels,
            reduction="sum",
            **kwargs | reads_of(self.text_decoder),
        )
        items = labels.shape[0] if num_items_in_batch is None and labels is not None else num_items_in_batch
        return BlipTextVisionModelOutput(
            loss=None if labels is None else answer.loss / items,
            image_embeds=image_embeds,
            last_hidden_state=image_embeds,
            hidden_states=None if seen is None else seen.hidden_states,
            attentions=None if seen is None else seen.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        image_index: Tensor | None = None,
        image_embeds: Tensor | None = None,
        question_states: Tensor | None = None,
        **generate_kwargs,
    ) -> Tensor:
        """Token ids of the answers; ``generate_kwargs`` go to transformers' ``generate`` (papers: num_beams=3, max_length=10). image_embeds
        and question_states, of :meth:`encode_images` and :meth:`encode_questions`, stand in for what they were made of.

        The question's padding is masked, so an answer does not depend on what else is in the batch (the official code attends to it).
        """
        question = question_states
        if question is None:
            if image_embeds is None:
                image_embeds = self.encode_images(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
            question = self.encode_questions(input_ids, attention_mask, image_embeds, image_index)
        elif attention_mask is not None and attention_mask.shape != question.shape[:2]:
            raise ValueError(f"attention_mask is {list(attention_mask.shape)}, and question_states are {list(question.shape)}: give [B, M]")
        text = self.config.text_config
        return self.text_decoder.generate(
            input_ids=torch.full((len(question), 1), self.decoder_start_token_id, device=question.device), eos_token_id=text.sep_token_id,
            pad_token_id=text.pad_token_id, encoder_hidden_states=question, encoder_attention_mask=attention_mask if attention_mask is not
            None else question.new_ones(question.shape[:2], dtype=torch.long), **generate_kwargs,
        )


def _check_question_states(states: Tensor, mask: Tensor | None, answers: int, others: dict[str, Tensor | None]) -> None:
    """ValueError unless states are [B, M, C] of ``answers`` questions, mask [B, M], and no input that they stand in for is given."""
    if given := [name for name, tensor in others.items() if tensor is not None]:
        raise ValueError(f"question_states stand in for {', '.join(given)}: give one or the other")
    shape = tuple(states.shape)
    if len(shape) != 3 or answers != shape[0]:
        raise ValueError(f"question_states are {list(shape)}: give [{answers}, M, C], one question for each answer")
    if mask is not None and mask.shape != shape[:2]:
        raise ValueError(f"attention_mask is {list(mask.shape)}, and question_states are {list(shape)}: give [B, M] of them")


class DropPath:
    """Stochastic depth as a hook on a residual branch: in training a sample's branch is zero with probability ``rate``, else
    divided by ``1 - rate``. A hook, so that the branch's module may be transformers' or ours."""

    passes_rest_on = True  # of what attention returns it reads the output alone

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, args, output):
        if not module.training or self.rate == 0.0:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        keep = branch.new_empty(branch.shape[0], *([1] * (branch.dim() - 1))).bernoulli_(1 - self.rate).div_(1 - self.rate)
        return (branch * keep, *output[1:]) if isinstance(output, tuple) else branch * keep


FAMILY = Family(
    kind="vqa",
    known=BlipForQuestionAnswering,
    model=MissForQuestionAnswering,
    config=BlipConfig,
    parts=PARTS,
    plan="F/LoRA/LoRA",
    configs={"miss": miss_config, "miss-tiny": partial(miss_config, tiny=True)},
)
