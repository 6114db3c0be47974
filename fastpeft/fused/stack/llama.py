"""LLaMA's stack of layers on fastpeft's operators: the same parameters under the same names, another ``forward``.

What differs from transformers' own:

- where nobody reads logits (``lean_logits``) and every layer is row-wise or ours (:mod:`fastpeft.fused.stack.flatten`), a training step
  computes no padding: linear layers, norms and activations see real tokens [T, C] only, the last layer labelled ones; attention sees each
  sample in a row of its own. A batch is padded ([B, L] with ``attention_mask``) or packed ([1, T] whose ``position_ids`` start again at
  every sample). Otherwise modules see [B, L, C], and what a caller may read are transformers' values, at padding too;
- logits of a training step with labels exist at labelled positions, for the loss, and are formed elsewhere when they are read;
- attention forms no probabilities, takes prefixes, IA3's factors, and Excitor's extra keys, merged into the layer's own before the cache
  keeps them;
- statistics, rotary tables and the loss are float32 under 16-bit weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import can_return_tuple

from fastpeft.fused.attention.common import READ_BY_ATTENTION, as_key_mask
from fastpeft.fused.attention.llama import FusedLlamaAttention
from fastpeft.fused.attention.prefix_cache import SharedPrefixCache
from fastpeft.fused.layout import Layout, TokenPlan, TreeLayout, packed_rows, rows_layout, self_layout, tree_layout
from fastpeft.fused.stack.any_stack import read_of
from fastpeft.fused.stack.driver import prefixes_of, run_layers, without_checkpoints
from fastpeft.fused.stack.flatten import why_not_flat
from fastpeft.fused.stack.lower import run_stack
from fastpeft.methods.base import has_hooks
from fastpeft.methods.excitor import Visual
from fastpeft.methods.mm_adapter import Place, Routing
from fastpeft.ops._common import accumulator, to_device_async
from fastpeft.registry import fuses, path_of
from fastpeft.static_shapes import NotStatic, sizes

ROTARY = "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding"


# what to do about attentions that are asked for, by whether the model runs in fused attention alone
HOW = {True: "what is attached here runs in it alone: go without output_attentions", False: "call fastpeft.restore(model) first"}


@fuses("transformers.models.llama.modeling_llama.LlamaModel", layout_aware=True)
class FusedLlamaModel:
    """The stack of layers. Computes no padding where nobody reads it and every layer can do without; hands each layer its prefix.

    On plain batches its values are LlamaModel's, padding included. LlamaModel's own forward runs, with the fused layers in it, wherever
    something is asked that this one does not know (see :meth:`_is_plain`)."""

    # fastpeft.adapt sets it, and a prefix or an Excitor implies it. Then each sample of a batch computes as it does alone: positions count
    # from its first token, not from padding on its left, and position_ids that start again within a row mark packed samples in training,
    # whatever config.use_cache says.
    samples_alone = False

    @property
    def prefix_shape(self) -> tuple[int, int, int]:
        return len(self.layers), self.config.num_key_value_heads, self.layers[0].self_attn.head_dim

    @property
    def alone(self) -> bool:
        """Whether each sample computes as alone: see ``samples_alone``."""
        adapted = self.samples_alone or getattr(self, "prefix_encoder", None) is not None
        return adapted or any(getattr(attention, "excitor", None) is not None for attention in attentions(self))

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return "" if is_causal(module) else "it is not causal (is_causal of its configuration or of an attention layer is False)"

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_mask: Tensor | None = None,
        modality: Tensor | None = None,
        modality_embeds: tuple[Tensor, ...] | None = None,
        prefix_lengths: Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Arguments as LlamaModel's; attention_mask [B, N]: nonzero = attend. What kwargs hold reaches every layer.
        output_mask [B, L] bool: the caller reads the last hidden state there only, elsewhere it may be zero; and no cache unless
        use_cache=True.
        modality [B] int64: of each sample; modality_embeds, a tuple of [C]: the modalities' tokens, which MM-Adapters are routed by.
        prefix_lengths [B] int64: the B samples lie in one row, and each goes on from so many first tokens of the one before, which are in
        the row once; position_ids [1, T] begin there (:class:`fastpeft.data.CausalCollator` makes such rows)."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        given |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "output_mask": output_mask}
        given |= {"modality": modality, "modality_embeds": modality_embeds, "prefix_lengths": prefix_lengths}
        return run_stack(self, given | kwargs, lambda options: self._call(**options))

    def _call(
        self, *, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_mask, modality, modality_embeds,
        prefix_lengths, **kwargs,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """``forward``, its lower layers ours or those that stand for them."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "past_key_values": past_key_values}
        if output_mask is None:  # a model around this one, with images say, may know
            read = read_of(self, given | {"attention_mask": attention_mask})
            output_mask = None if read is None else read.outputs()
        ours = getattr(self, "prefix_encoder", None) is not None or modality is not None or kwargs.get("visual") is not None
        tree = None if prefix_lengths is None else self._tree(given, attention_mask, position_ids, prefix_lengths, use_cache)
        if tree is not None:
            _check_one_image(tree, modality, kwargs.get("visual"))
        ours |= tree is not None or isinstance(past_key_values, SharedPrefixCache)
        alone = self.alone or ours
        asked, use_cache = use_cache, tree is None and self._uses_cache(use_cache, alone)
        position_ids = self._positions(given, attention_mask, position_ids) if alone else position_ids
        if not ours and not self._is_plain(given, attention_mask, kwargs, output_mask):
            return super().forward(attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache, **given, **kwargs)
        about = (asked, use_cache, output_mask, modality, modality_embeds, tree)
        return self._forward(attention_mask, position_ids, *about, ours, given, kwargs)

    def _tree(self, given: dict, mask: Tensor | None, position_ids: Tensor | None, lengths: Tensor, use_cache: bool | None) -> TreeLayout:
        """Where the tokens of samples that share prefixes lie. ValueError where this call cannot be of such."""
        for name, wrong in (
            ("a cache", use_cache or given["past_key_values"] is not None),
            ("attention_mask", mask is not None),
            ("torch.compile", torch.compiler.is_compiling()),
            ("attention that is not causal", not is_causal(self)),
            ("attention of somebody else's", not all(isinstance(attention, FusedLlamaAttention) for attention in attentions(self))),
        ):
            if wrong:
                raise ValueError(f"samples that share prefixes (prefix_lengths) go without {name}: leave one of the two out")
        tokens = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
        return tree_layout(position_ids, lengths, tokens)

    def _forward(
        self, attention_mask, position_ids, asked, use_cache, output_mask, modality, modality_embeds, tree, ours: bool, given, kwargs
    ) -> BaseModelOutputWithPast:
        """``forward`` through our own driver. ``asked``: use_cache as it was given; ``ours``: transformers' own forward cannot do it."""
        if output_asked(self, "attentions", kwargs):
            raise ValueError(f"fused attention forms no probabilities to return; {HOW[ours]}")
        cache, hidden = given["past_key_values"], given["inputs_embeds"]
        hidden = self.embed_tokens(given["input_ids"]) if hidden is None else hidden
        states = [] if output_asked(self, "hidden_states", kwargs) else None
        kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        cached = use_cache or cache is not None
        packed = position_ids if not cached and attention_mask is None else None
        if output_mask is not None and asked is None and cache is None:
            use_cache = cached = False
        flat = not ours or self._sees_tokens_alone()
        read = output_mask if flat and not cached and states is None else None
        plan = self._plan(hidden, attention_mask, packed, read, flat, kwargs.pop("is_causal", None), tree)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        position_ids = self._counted(hidden, cache) if position_ids is None else position_ids
        if torch.compiler.is_compiling() or is_fixed(cache):
            plan = plan._replace(mask=self._mask_of_transformers(hidden, attention_mask, cache, position_ids), causal=None)
        return self._run(hidden, plan, flat, position_ids, cache, modality, modality_embeds, states, kwargs)

    def _sees_tokens_alone(self) -> bool:
        """Whether every layer can do without the padding of a batch."""
        return not torch.compiler.is_compiling() and not why_not_flat(self, self._modules["layers"], self.norm)

    @staticmethod
    def _counted(hidden: Tensor, cache) -> Tensor:
        """Positions [1, L] that count on from the cache's."""
        past = 0 if cache is None else cache.get_seq_length()
        return torch.arange(past, past + hidden.shape[1], device=hidden.device)[None]

    def _uses_cache(self, use_cache: bool | None, alone: bool) -> bool:
        """As transformers resolves it; but in training samples alone need none by default."""
        if use_cache is None:
            use_cache = self.config.use_cache and not (alone and self.training)
        return bool(use_cache) and not (self.gradient_checkpointing and self.training)

    def uses_cache_by_default(self) -> bool:
        """Whether a call that does not say so fills a cache."""
        return self._uses_cache(None, self.alone)

    def _positions(self, given: dict, mask: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
        """Of samples alone: padding on the left is not counted."""
        if position_ids is not None or given["past_key_values"] is not None or mask is None or mask.dim() != 2:
            return position_ids
        before = ((mask != 0).cumsum(1) == 0).sum(1, keepdim=True)
        tokens = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
        return to_device_async((torch.arange(tokens.shape[1], device=mask.device) - before).clamp(min=0), tokens.device)

    def _is_plain(self, given: dict, mask: Tensor | None, options: dict, output_mask: Tensor | None) -> bool:
        """Whether a call is of the kind that this class's own loop serves: causal, in one of transformers' own attention functions, under
        a mask over keys, through layers that nobody watches, without a cache of fixed size."""
        cache = given["past_key_values"]
        if torch.compiler.is_compiling() or is_fixed(cache):
            return False
        if options.get("is_causal") is not None or not is_causal(self) or any(options.get(name) is not None for name in READ_BY_ATTENTION):
            return False
        if output_asked(self, "attentions", options) or output_asked(self, "hidden_states", options):
            return False
        if mask is not None:
            tokens = given["input_ids"] if given["inputs_embeds"] is None else given["inputs_embeds"]
            past = 0 if cache is None else cache.get_seq_length()
            if not isinstance(mask, Tensor) or mask.shape != (tokens.shape[0], past + tokens.shape[1]):
                return False
            if (
                self.config._attn_implementation == "eager"
                and sizes() is None
                and not bool(mask.all())
                and (output_mask is None or _outside(output_mask, mask))
            ):
                return False  # what padding attends to there is everything
        return not why_not_flat(self, self._modules["layers"], self.norm) and not any(map(FusedLlamaAttention.why_not, attentions(self)))

    def _layers(self) -> nn.ModuleList:
        return self.layers[: self.config.num_hidden_layers]

    def _plan(self, hidden, mask, position_ids, output_mask, flat: bool, causal: bool | None, tree: TreeLayout | None) -> TokenPlan:
        """How the tokens lie. position_ids: where they may mark packed samples; output_mask: the only outputs that are read."""
        if tree is not None:
            return _tree_plan(tree, hidden, output_mask, flat)
        causal = is_causal(self) if causal is None else causal
        return self._text_plan(hidden, as_key_mask(mask), position_ids, output_mask, flat, causal)

    def _text_plan(self, hidden, mask, position_ids, output_mask, flat: bool, causal: bool) -> TokenPlan:
        """The same of texts each by itself, ``mask`` over keys."""
        if (static := sizes()) is not None:
            return self._static_plan(hidden, mask, output_mask, causal, static.tokens)
        if mask is not None and (mask.dim() == 4 or torch.compiler.is_compiling()):
            return TokenPlan(mask=mask, causal=None if mask.dim() == 4 else causal)
        if torch.compiler.is_compiling():
            return TokenPlan(causal=causal)
        if mask is not None and mask.shape == hidden.shape[:2] and bool(mask.all()):
            mask = None
        if not causal:
            return TokenPlan(mask=mask, causal=False)
        if mask is None and position_ids is not None and (rows := packed_rows(position_ids, hidden)) is not None:
            tokens = Layout(*hidden.shape[:2], None)
            return TokenPlan(tokens if flat else None, rows, output_mask=output_mask)
        if output_mask is None or (mask is not None and _outside(output_mask, mask)):
            return TokenPlan(mask=mask)
        tokens = self_layout(hidden.shape[:2], mask, hidden.device)
        return TokenPlan(tokens, tokens if mask is None else rows_layout(mask.sum(1), hidden.device), output_mask=output_mask)

    @staticmethod
    def _static_plan(hidden: Tensor, mask: Tensor | None, output_mask: Tensor | None, causal: bool, tokens: int) -> TokenPlan:
        """Of padding on the right, which lies behind every token that causality lets see: attention needs no mask."""
        if output_mask is None or not causal or mask is None or mask.shape != hidden.shape[:2]:
            raise NotStatic("the stack computes padding here, or is not causal")
        layout = self_layout(hidden.shape[:2], mask, hidden.device, tokens)
        return TokenPlan(layout, layout, output_mask=output_mask)

    def _run(self, hidden, plan, flat, position_ids, cache, modality, modality_embeds, states, kwargs) -> BaseModelOutputWithPast:
        """The layers over hidden [B, L, C]. ``states``: a list for the hidden states, None where nobody asks."""
        layers = self._layers()
        prefixes = prefixes_of(self, layers)
        if modality is not None:
            hidden, kwargs["routing"] = self._routing(hidden, modality, modality_embeds, cache, prefixes, plan)
        last = run_layers(
            layers,
            hidden,
            plan,
            prefixes=prefixes,
            norm=self.norm,
            states=states,
            attention_mask=None if plan.mask is None else to_device_async(plan.mask, hidden.device),
            position_embeddings=self._rotary_tables(hidden, plan, flat, position_ids, cache),
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            causal=plan.causal,
            **kwargs,
        )  # as in transformers, the last of the states is the normed one
        return BaseModelOutputWithPast(
            last_hidden_state=last, past_key_values=cache, hidden_states=None if states is None else tuple(states)
        )

    def _rotary_tables(self, hidden: Tensor, plan: TokenPlan, flat: bool, position_ids: Tensor, cache) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [B or 1, L, d], or [T, d] where the plan lays tokens out; positions count on from the end of a prefix."""
        encoder, positions = getattr(self, "prefix_encoder", None), to_device_async(position_ids, hidden.device)
        if isinstance(cache, SharedPrefixCache):
            positions = positions + cache.prefix_tokens
        if encoder is not None:
            positions = positions + encoder.tokens
        like = hidden.new_empty(0, dtype=accumulator(hidden.dtype))  # float32 tables, where only our own modules read them
        known = flat and path_of(type(self.rotary_emb)) == ROTARY and not has_hooks(self.rotary_emb)
        tables = self.rotary_emb(like if known else hidden, position_ids=positions)
        if plan.layout is not None:
            tables = tuple(t.expand(hidden.shape[0], -1, -1) for t in tables)
        return tables if plan.tokens is None else tuple(map(plan.tokens.unpad, tables))

    def _routing(self, hidden: Tensor, modality: Tensor, modality_embeds, cache, prefixes, plan: TokenPlan) -> tuple[Tensor, Routing]:
        """(hidden, what routes MM-Adapters): the mixtures of the modalities' tokens, and each token's or sample's modality."""
        modalities = torch.stack(modality_embeds).to(hidden.dtype)
        weights = self._routes_of(modalities, cache, prefixes)
        if not weights and torch.is_grad_enabled():
            hidden = hidden + 0.0 * modalities.sum()  # nothing reads them: their gradient is zero, not absent
        index = to_device_async(modality, hidden.device)
        if plan.layout is not None:
            row = plan.layout.row if sizes() is None else plan.layout.cells_on(hidden.device) // plan.layout.columns
            index = index[to_device_async(row, hidden.device)]
            index = index if plan.tokens is not None else index.view(hidden.shape[:2])
        return hidden, Routing(index, weights)

    def _routes_of(self, modalities: Tensor, cache, prefixes) -> dict[Place, Tensor]:
        """What :meth:`routes` gives; in generation it stays with the cache."""
        if getattr(cache, "routes", None) is not None:
            return cache.routes
        weights = self.routes(modalities, prefixes)
        if cache is not None:
            cache.routes = weights
        return weights

    def routes(self, hidden: Tensor, prefixes=None) -> dict[Place, Tensor]:
        """The mixture [modalities, 2] that each MM-Adapter gives to the modalities' tokens, hidden [modalities, C].

        Nothing attends to these tokens and they to nothing but themselves, as in the official masks, so one of each serves the whole
        batch, in a pass of its own."""
        routing = Routing(torch.arange(len(hidden), device=hidden.device))
        table = hidden.new_ones(len(hidden), self.layers[0].self_attn.head_dim, dtype=accumulator(hidden.dtype))
        layers = self._layers()
        with without_checkpoints(layers):
            run_layers(
                layers,
                hidden,
                TokenPlan(layout=Layout(len(hidden), 1, None)),
                prefixes=prefixes_of(self, layers) if prefixes is None else prefixes,
                position_embeddings=(table, table),  # one key each: no rotation tells
                routing=routing,
                causal=True,
            )
        return routing.weights

    def _mask_of_transformers(self, hidden, mask, cache, positions) -> Tensor | None:
        """transformers' own mask, for caches of fixed size, and for compiled graphs that serve every length."""
        return create_causal_mask(
            config=self.config, inputs_embeds=hidden, attention_mask=mask, past_key_values=cache, position_ids=positions
        )


def _tree_plan(tree: TreeLayout, hidden: Tensor, output_mask: Tensor | None, flat: bool) -> TokenPlan:
    """Of samples that share prefixes; all of the row's tokens are somebody's."""
    return TokenPlan(Layout(*hidden.shape[:2], None) if flat else None, tree, output_mask=output_mask)


def is_fixed(cache) -> bool:
    """Whether a cache is of fixed size, as transformers' static ones are."""
    return cache is not None and cache.is_compileable


def check_takes_prefixes(stack: nn.Module, given: Tensor | int | None) -> None:
    """ValueError where what samples share (prefix_lengths, prefix_length) is ``given`` to a stack that does not know it."""
    if given is not None and not isinstance(stack, FusedLlamaModel):
        raise ValueError(f"samples that share prefixes are for a fused stack, not a {type(stack).__name__}: call fastpeft.optimize(model)")


def _check_one_image(layout: TreeLayout, modality: Tensor | None, visual: Visual | None) -> None:
    """ValueError where samples that share a prefix have not the same modality, or do not see the same image: the prefix would differ."""
    root = torch.tensor(layout.tree.shared).eq(0).cumsum(0) - 1
    for name, index in (("modality", modality), ("image (visual_index)", None if visual is None else visual.index)):
        if index is not None and (wrong := index.cpu() != index.cpu()[layout.tree.roots][root]).any():
            raise ValueError(f"sample {int(wrong.nonzero()[0])} shares a prefix with one of another {name}: give it a prefix_length of 0")


def _outside(output_mask: Tensor, mask: Tensor) -> bool:
    """Whether some of ``output_mask`` stands where ``mask`` has nothing, or cannot be told (a cache is before it)."""
    return output_mask.shape != mask.shape or (sizes() is None and bool((output_mask.cpu() & (mask.cpu() == 0)).any()))


def attentions(model: nn.Module) -> list[nn.Module]:
    """Of every layer that has one, inside PEFT's adaption prompt too; a user may have put a module of his own in its place."""
    layers = model.layers[: model.config.num_hidden_layers]
    return [getattr(layer.self_attn, "model", layer.self_attn) for layer in layers if hasattr(layer, "self_attn")]


def is_causal(model: nn.Module) -> bool:
    """False where its configuration or one of its attention layers was told not to be."""
    if getattr(model.config, "is_causal", None) is False:
        return False
    return all(getattr(attention, "is_causal", True) for attention in attentions(model))


def output_asked(model: nn.Module, what: str, options: dict) -> bool:
    """Whether the caller, or else the configuration, asks for ``output_<what>``."""
    value = options.get(f"output_{what}")
    return bool(getattr(model.config, f"output_{what}", False) if value is None else value is not False)
