"""LLaMA's modules on fastpeft's operators: the same parameters under the same names, another ``forward``.

What differs from transformers' own:

- no padding is computed: linear layers, norms and activations see real tokens [T, C] only; attention sees each sample in a row of its own.
  A batch is padded ([B, L] with ``attention_mask``) or packed ([1, T] whose ``position_ids`` start again at every sample);
- logits of a training step with labels exist at labelled positions only, for the loss, and are not returned;
- attention forms no probabilities, takes prefixes, IA3's factors, and Excitor's extra keys, merged into the layer's own before the cache
  keeps them;
- statistics, rotary tables and the loss are float32 under 16-bit weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama import modeling_llama
from transformers.utils import can_return_tuple

from fastpeft import ops
from fastpeft.methods import Part
from fastpeft.methods.base import watched
from fastpeft.methods.excitor import Visual
from fastpeft.methods.mm_adapter import Routing
from fastpeft.methods.quantized import is_quantized
from fastpeft.models.attend import as_key_mask, project_one
from fastpeft.models.layout import IGNORED, Layout, next_labels, rows_layout, self_layout, tail_of
from fastpeft.models.llama_layers import MLP, Attention, DecoderLayer, RMSNorm
from fastpeft.ops._common import accumulator, sent
from fastpeft.ops._savings import on

SIZES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama-13b": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "llama-tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512}
    | {"max_position_embeddings": 1024, "initializer_range": 0.08},
}


def llama_config(name: str, **overrides) -> LlamaConfig:
    """The first LLaMA's numbers (vocabulary 32,000, eps 1e-6) at a size of SIZES. ``overrides``: fields of LlamaConfig."""
    if unknown := sorted(set(overrides) - LlamaConfig().to_dict().keys()):
        raise ValueError(f"a LLaMA has no {', '.join(unknown)}; overrides are fields of transformers' LlamaConfig")
    defaults = {"vocab_size": 32_000, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaConfig(**defaults | {"max_position_embeddings": 2048} | SIZES[name] | overrides)


def llama_part(name: str = "llm", path: str = "", **more) -> Part:
    """A LLaMA as a part of a backbone; ``path`` is where its LlamaForCausalLM stands."""
    defaults = {
        "lora": ("q_proj", "v_proj"),
        "ia3": ("k_proj", "v_proj", "down_proj"),
        "ia3_feedforward": ("down_proj",),
        "attention": ("self_attn",),
        "ffn": ("mlp",),
        "prefix_host": "model",
        "peft_task": "CAUSAL_LM",
    }
    return Part(name, path, **defaults | more)


PARTS = (llama_part(),)


class Model(modeling_llama.LlamaModel):
    """The stack of layers: hands each its prefix, computes no padding, counts positions from the end of the prefix."""

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        return len(self.layers), self.config.num_key_value_heads, self.layers[0].self_attn.head_dim

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        wanted: Tensor | None = None,
        modality: Tensor | None = None,
        modality_embeds: tuple[Tensor, ...] | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments as LlamaModel's; attention_mask [B, N]: nonzero = attend. What kwargs hold reaches every layer. Hidden states of
        padding are zero. Where neither a mask nor a cache is given, position_ids that start again within a row mark packed samples.
        wanted [B, L] bool: the caller reads the last hidden state there only, elsewhere it may be zero. modality [B] int64: of each
        sample; modality_embeds, a tuple of [C]: the modalities' tokens, which MM-Adapters are routed by."""
        if output_attentions:
            raise ValueError("fused attention forms no probabilities to return; call fastpeft.restore(model) first")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask, positions = as_key_mask(attention_mask), position_ids
        if positions is None and past_key_values is None and mask is not None and mask.dim() == 2:
            before = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # padding on the left is not counted: prefixes and Excitor would tell
            positions = (torch.arange(hidden.shape[1], device=mask.device) - before).clamp(min=0)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        encoder = getattr(self, "prefix_encoder", None)
        if positions is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]
        if past_key_values is not None and past_key_values.is_compileable and (mask is None or mask.dim() == 2):
            mask = self._static_mask(hidden, attention_mask, past_key_values, positions)
        tokens = layout = None
        if past_key_values is None and (mask is None or mask.dim() == 2):
            tokens, layout = self._layouts(hidden, mask, position_ids)
            mask = None
        positions = sent(positions, hidden.device)
        if encoder is not None:
            positions = positions + encoder.tokens
        tables = self.rotary_emb(hidden.new_empty(0, dtype=accumulator(hidden.dtype)), position_ids=positions)
        if tokens is not None:
            tables = tuple(tokens.gather(t.expand(hidden.shape[0], -1, -1)) for t in tables)
            hidden = tokens.gather(hidden)
        pad = (lambda x: x) if tokens is None else tokens.spread
        states = [hidden]
        prefixes = [None] * len(self.layers) if encoder is None else encoder()
        how, tail = {name: value for name, value in {"layout": layout, **kwargs}.items() if value is not None}, None
        if modality is not None:
            modalities = torch.stack(modality_embeds).to(hidden.dtype)
            weights = self._routes_of(modalities, past_key_values, prefixes)
            if not weights and torch.is_grad_enabled():
                hidden = hidden + 0.0 * modalities.sum()  # nothing reads them: their gradient is zero, not absent
            index = sent(modality, hidden.device)
            how["routing"] = Routing(index if layout is None else index[sent(layout.row, hidden.device)], weights)
        if wanted is not None and tokens is not None and not output_hidden_states and on("labelled"):
            tail = tail_of(tokens, wanted, True, hidden.device, layout)
        for layer, prefix in zip(self.layers, prefixes):
            if tail is not None and layer is self.layers[-1]:
                pad, how = tail.outputs.spread, how | {"tail": tail}
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_embeddings=tables,
                past_key_values=past_key_values,
                **how | ({} if prefix is None else {"prefix": prefix}),
            )
            states += [hidden] if output_hidden_states else []
        hidden = pad(self.norm(hidden))
        if output_hidden_states:
            states = [*map(pad, states[:-1]), hidden]  # as in transformers, the last is the normed one
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=tuple(states) if output_hidden_states else None
        )

    def _routes_of(self, modalities: Tensor, cache, prefixes) -> dict[int, Tensor]:
        """What :meth:`routes` gives; in generation it stays with the cache."""
        if getattr(cache, "routes", None) is not None:
            return cache.routes
        weights = self.routes(modalities, prefixes)
        if cache is not None:
            cache.routes = weights
        return weights

    def routes(self, hidden: Tensor, prefixes=None) -> dict[int, Tensor]:
        """The mixture [modalities, 2] that each layer's MM-Adapter gives to the modalities' tokens, hidden [modalities, C].

        Nothing attends to these tokens and they to nothing but themselves, as in the official masks, so one of each serves the whole
        batch, in a pass of its own."""
        routing = Routing(torch.arange(len(hidden), device=hidden.device))
        table = hidden.new_ones(len(hidden), self.layers[0].self_attn.head_dim, dtype=accumulator(hidden.dtype))
        # one key each: no rotation tells
        how = {"position_embeddings": (table, table), "layout": Layout(len(hidden), 1, None), "routing": routing}
        if prefixes is None:
            encoder = getattr(self, "prefix_encoder", None)
            prefixes = [None] * len(self.layers) if encoder is None else encoder()
        for layer, prefix in zip(self.layers, prefixes):
            hidden = layer(hidden, prefix=prefix, **how)
        return routing.weights

    def _layouts(self, hidden: Tensor, mask: Tensor | None, position_ids: Tensor | None) -> tuple[Layout, Layout]:
        """(where tokens lie in the batch as given, where they lie in attention); both wait for the device if what they read is there."""
        tokens = self_layout(hidden.shape[:2], mask, hidden.device)
        if mask is not None and tokens.place is not None:
            return tokens, rows_layout(mask.sum(1), hidden.device)
        if mask is None and position_ids is not None:
            ids = position_ids.expand(hidden.shape[0], -1).cpu()
            starts = torch.ones_like(ids, dtype=torch.bool)
            starts[:, 1:] = ids[:, 1:] != ids[:, :-1] + 1
            first = starts.flatten().nonzero().squeeze(1)
            if len(first) > hidden.shape[0]:
                return tokens, rows_layout(torch.diff(first, append=first.new_tensor([ids.numel()])), hidden.device)
        return tokens, tokens

    def _static_mask(self, hidden, mask, cache, positions) -> Tensor | None:
        """transformers' own mask, for caches of fixed size."""
        return create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=cache, position_ids=positions
        )


class CausalLM(modeling_llama.LlamaForCausalLM):
    """LLaMA with its head. In training, with labels, logits exist at labelled positions only and are not returned."""

    host_inputs = ("attention_mask", "position_ids", "labels")  # best left on the host: nobody then waits for the device

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        visual: Tensor | None = None,
        visual_index: Tensor | None = None,
        visual_seen: Tensor | None = None,
        modality: Tensor | None = None,
        modality_embeds: tuple[Tensor, ...] | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Arguments as LlamaForCausalLM's: labels [B, L] with -100 where there is none, shifted here; ``loss`` is the mean over labelled
        tokens, or their sum over ``num_items_in_batch``. For Excitor,
        visual: features [U, V, D] of distinct images, of which sample b sees ``visual_index[b]`` (-1: none); or of each sample its own,
        ``visual_seen`` [B] bool saying which have one. For MMAdapter, modality and modality_embeds: as :class:`Model` takes them."""
        if modality is not None:
            kwargs |= {"modality": modality, "modality_embeds": modality_embeds}
        if visual is not None:
            own = torch.arange(len(visual))
            index = own if visual_index is None else visual_index.cpu()
            kwargs["visual"] = Visual(visual, index if visual_seen is None else own.masked_fill(~visual_seen.cpu(), -1))
        shift_labels, items = kwargs.pop("shift_labels", None), kwargs.pop("num_items_in_batch", None)
        labelled = labels is not None or shift_labels is not None
        if labelled and self.training and isinstance(self.model, Model):
            kwargs["wanted"] = next_labels(labels, shift_labels) != IGNORED
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if labelled and use_cache is None else use_cache,
            **kwargs,
        )
        hidden, logits, loss = outputs.last_hidden_state, None, None
        if not (labelled and self.training):
            logits = project_one(self.lm_head, kept_positions(hidden, logits_to_keep))
        if labelled:
            aligned = (hidden[:, :-1], labels[:, 1:]) if shift_labels is None else (hidden, shift_labels)
            loss = loss_of(self.lm_head, *aligned, items)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )


def kept_positions(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of hidden [B, L, C] the last ``logits_to_keep`` positions (0: all), or those a tensor names, as transformers' generate asks."""
    if isinstance(logits_to_keep, int):
        logits_to_keep = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
    return hidden[:, logits_to_keep]


def loss_of(head: nn.Module, hidden: Tensor, labels: Tensor, items: Tensor | int | None = None) -> Tensor:
    """Cross entropy of hidden [B, L, C] under ``head`` with labels [B, L], -100 for none: the mean over labelled tokens, or their sum
    over ``items``. Logits exist at labelled positions only."""
    reduction = "mean" if items is None else "sum"
    if type(head) is nn.Linear and not is_quantized(head.weight) and not watched(head):
        loss = ops.linear_cross_entropy(hidden, head.weight, head.bias, labels, reduction=reduction)
    else:  # an adapter on the head, ours or PEFT's, a hook, or a quantised head: the weight alone is not what it computes
        labels = labels.to(hidden.device)
        rows = labels.flatten() != -100
        logits = head(hidden.flatten(0, 1)[rows])
        loss = F.cross_entropy(logits.to(accumulator(logits.dtype)), labels.flatten()[rows], reduction=reduction)
    return loss if items is None else loss / items


# transformers' class -> ours; the exact type only, as a subclass may mean something else
SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    modeling_llama.LlamaRMSNorm: RMSNorm,
    modeling_llama.LlamaMLP: MLP,
    modeling_llama.LlamaAttention: Attention,
    modeling_llama.LlamaDecoderLayer: DecoderLayer,
    modeling_llama.LlamaModel: Model,
    modeling_llama.LlamaForCausalLM: CausalLM,
}
# these hand masks, layouts and prefixes down in a form that only they read
CARRIERS = (Model, DecoderLayer, Attention)
