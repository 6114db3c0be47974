"""LLaMA's self-attention on fastpeft's operators: rotary embedding, grouped heads, Excitor, adaption prompts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastpeft import ops
from fastpeft.fused.attention.common import READ_BY_ATTENTION, dense_mask_attention, forms_probabilities, why_not_fused
from fastpeft.fused.attention.prefix_cache import shared_before
from fastpeft.fused.layers.projections import Recomputes, output_factor, project_one, project_together, rescaled
from fastpeft.fused.layout import LabelledQueries, Layout, TreeLayout, rows_of
from fastpeft.methods.adaption_prompt import Prompted, attend_prompt
from fastpeft.methods.base import has_hooks
from fastpeft.methods.excitor import Visual
from fastpeft.ops.attention_inputs import one_pass, without_rows
from fastpeft.ops.reserved_prefix import reserved_pays
from fastpeft.registry import fuses


@fuses("transformers.models.llama.modeling_llama.LlamaAttention", layout_aware=True)
class FusedLlamaAttention(Recomputes):
    """Self-attention with grouped heads. Returns (output, None): probabilities are not formed. Where its settings or its caller ask for
    what the fused form has not (see :meth:`why_not_now`), transformers' own forward runs."""

    takes_flat_tokens = True
    visual_dim: int | None = None  # width of the images' features that Excitor sees here

    @property
    def excitor_heads(self) -> int:
        return self.config.num_attention_heads

    @staticmethod
    def why_not(module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        return why_not_fused(module) or ("" if isinstance(module.scaling, int | float) else "its scaling is no number")

    def why_not_now(self, attention_mask: Tensor | None, options: dict) -> str:
        """'' or why this call is for transformers' own forward. attention_mask as transformers' model gives it, options: the keywords."""
        if reason := self.why_not(self):
            return reason
        if forms_probabilities(self, options):
            return "someone reads its probabilities, which fused attention does not form"
        if given := [name for name in READ_BY_ATTENTION if options.get(name) is not None]:
            return f"{given[0]} is given, which the fused form does not know"
        name = self.config._attn_implementation or "eager"
        if name not in ("eager", "sdpa") or (attention_mask is not None and attention_mask.dim() != 4):
            return f"{name} makes masks of its own kind"
        return ""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        causal: bool | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
        layout: Layout | None = None,
        visual: Visual | None = None,
        labelled: LabelledQueries | None = None,
        prompted: Prompted | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states [B, M, C], or [T, C] with a ``layout`` (outputs at a ``labelled``'s rows only, where one is given);
        position_embeddings (cos, sin), each [B or 1, M, d] or [T, d]. ``causal`` None: called as transformers' model calls it, with its
        mask; True or False: by our own stack, attention_mask [B, N] bool over keys. ``layout`` with hidden_states [B, M, C]: samples are
        packed. visual: images' features for Excitor; prompted: an adaption prompt, where it is not this module's own."""
        adaption, excitor = getattr(self, "adaption", None), self._active_excitor()
        prompted = prompted if adaption is None else adaption.prompted
        reason = self.why_not_now(attention_mask, kwargs) if causal is None else self.why_not(self)
        if reason:
            if causal is not None or any(attached is not None for attached in (prefix, excitor, prompted)):
                raise ValueError(f"attention {self.layer_idx} must run its own forward, as {reason}; what was attached to it cannot")
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        shape, tables = hidden_states.shape[:-1], tuple(t.unsqueeze(-2) for t in position_embeddings)
        # l_v moves to the output, except over a prefix, whose values it does not touch, or a cache, which a caller may read
        values_raw = prefix is None and past_key_values is None
        l_v = output_factor(self.v_proj) if values_raw else None
        others = (attention_mask, past_key_values, excitor, prompted, labelled, getattr(layout, "tree", None))
        behind = self._to_stand_behind(prefix, causal, others)
        turning = self._turns_with_keys(excitor, hidden_states, layout, visual, tables[0], labelled)
        if labelled is None:
            linears = (self.q_proj, self.k_proj, self.v_proj)
            as_read = partial(self._tables, linears, tables, layout, values_raw, behind=behind, raw=turning)
            q, k, v = self.projected(as_read, hidden_states, linears)
            keys = layout
        else:
            layout, keys = labelled.queries, labelled.keys
            asked, hidden_states = (rows_of(hidden_states, index) for index in (labelled.tokens, labelled.seen))
            asking, tables = (tuple(t if index is None else t[index] for t in tables) for index in (labelled.tokens, labelled.seen))
            (q,) = self._tables((self.q_proj,), asking, layout, True, asked)
            k, v = self._tables((self.k_proj, self.v_proj), tables, keys, values_raw, hidden_states)
            shape = asked.shape[:-1]
        if excitor is not None:
            of_tokens = (hidden_states, keys, visual, tables)
            q, k, v, prefix = self._with_excitor(excitor, turning, q, k, v, prefix, *of_tokens)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
            prefix = shared_before(past_key_values, self.layer_idx, prefix)
        tree = layout.tree if isinstance(layout, TreeLayout) else None
        rows = self._rows_before(k, behind, hidden_states, layout)
        context = self._attend_behind(rows, q, k, v, attention_mask, causal, prefix, kwargs.get("is_causal"), tree)
        if prompted is not None:
            context = attend_prompt(context, q, *self._of_prompt(prompted.prompt, values_raw, past_key_values), prompted.gate)
        output = self._output(context, l_v, layout, shape)
        if prompted is not None and self.o_proj.bias is not None:
            output = output + self.o_proj.bias  # as PEFT: once for the tokens, once for the prompt
        return output, None

    @staticmethod
    def _to_stand_behind(prefix, causal: bool | None, others: tuple):
        """A prefix whose keys and values may get rows before the tokens': nothing else is attended to, or asks for less."""
        return prefix if causal and all(other is None for other in others) else None

    @staticmethod
    def _rows_before(k: Tensor, behind, hidden_states: Tensor, layout: Layout | None) -> int:
        """How many rows of k come before the tokens'."""
        if behind is None:
            return 0
        return k.shape[2] - (hidden_states.shape[1] if layout is None else layout.columns)

    def _active_excitor(self) -> nn.Module | None:
        excitor = getattr(self, "excitor", None)
        return excitor if excitor is not None and excitor.active else None

    def _output(self, context: Tensor, l_v: Tensor | None, layout: Layout | None, shape: torch.Size) -> Tensor:
        """Context [B, H, M, d], times IA3's l_v, through the output projection -> [*shape, C]."""
        context = context.transpose(1, 2).flatten(2)
        if l_v is not None:
            context = ops.rescale(context, self._per_query_head(l_v))
        return project_one(self.o_proj, context if layout is None else layout.unpad(context).view(*shape, -1))

    def _turns_with_keys(self, excitor, x: Tensor, layout: Layout | None, visual: Visual | None, cos: Tensor, labelled) -> bool:
        """Whether queries and keys are turned where Excitor's are merged, in one pass."""
        if excitor is None or labelled is not None or isinstance(layout, TreeLayout):
            return False
        return excitor.turns(x, self.head_dim, visual, cos) and not any(map(has_hooks, excitor.modules()))

    def _with_excitor(
        self, excitor, turning: bool, q: Tensor, k: Tensor, v: Tensor, prefix, hidden_states: Tensor, keys: Layout | None,
        visual: Visual | None, tables,
    ):  # fmt: skip
        """(q, k, v, prefix) with Excitor's keys merged into k; ``turning``: q and k are still to be turned. Its gate is one number per
        query head: groups no longer share their keys."""
        if (groups := self.num_key_value_groups) > 1:
            v = v.repeat_interleave(groups, 1)
            prefix = prefix and tuple(p.repeat_interleave(groups, 0) for p in prefix)
        if turning:
            return *excitor.turn(q, k, hidden_states, keys, visual, tables), v, prefix
        if not isinstance(keys, TreeLayout) or visual is None:
            return q, excitor(k, hidden_states, keys, visual, tables), v, prefix
        rows, by_token = keys.by_root, k.transpose(1, 2).flatten(2)  # an image is seen by all tokens of a tree
        visual = visual._replace(index=visual.index[keys.tree.roots])
        k = rows.pad(by_token).unflatten(-1, (k.shape[1], -1)).transpose(1, 2)
        k = excitor(k, hidden_states.reshape(-1, hidden_states.shape[-1]), rows, visual, tuple(t.flatten(0, -3) for t in tables))
        return q, rows.unpad(k.transpose(1, 2).flatten(2))[None].unflatten(-1, (k.shape[1], -1)).transpose(1, 2), v, prefix

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool | None, prefix, is_causal: bool | None, tree=None
    ) -> Tensor:
        """[B, H, M, d]. ``causal`` None: ``mask`` and ``is_causal`` mean what they mean to transformers' functions. ``tree``: samples share
        prefixes."""
        options = {"prefix": prefix, "rescale": None, "scale": float(self.scaling)}
        options["dropout_p"] = self.attention_dropout if self.training else 0.0
        if tree is not None:
            return ops.tree_attention(q, k, v, tree, prefix=prefix, scale=options["scale"], dropout_p=options["dropout_p"])
        if causal is not None:
            return ops.attention(q, k, v, causal=causal, key_padding_mask=mask, **options)
        if mask is not None:
            return dense_mask_attention(q, k, v, mask, eager=self.config._attn_implementation == "eager", **options)
        M, causal = q.shape[2], self.is_causal if is_causal is None else is_causal
        if causal and M > 1 and k.shape[2] > M:  # a cache of fixed size, not yet filled: causality is aligned at the first key
            k, v = k[:, :, :M], v[:, :, :M]
        return ops.attention(q, k, v, causal=bool(causal), **options)

    def _attend_behind(self, rows: int, q: Tensor, k: Tensor, v: Tensor, mask, causal, prefix, is_causal, tree) -> Tensor:
        """:meth:`_attend`, ``rows`` of q, k and v being a prefix's."""
        if not rows:
            return self._attend(q, k, v, mask, causal, prefix, is_causal, tree)
        return without_rows(self._attend(q, k, v, mask, causal, None, is_causal, tree), rows)

    def _of_prompt(self, prompt: Tensor, values_raw: bool, cache) -> tuple[Tensor, Tensor]:
        """Keys, not rotated, and values of an adaption prompt [n, C], each [1, H_kv, n, d]; in generation they stay with the cache."""
        kept = {} if cache is None or torch.is_grad_enabled() else cache.__dict__.setdefault("prompts", {})
        if kept.get(self.layer_idx, (None,))[0] is prompt:
            return kept[self.layer_idx][1:]
        k, v = project_together((self.k_proj, self.v_proj), prompt.to(self.k_proj.weight.dtype).view(1, -1, prompt.shape[-1]))
        k, v = rescaled(self.k_proj, k), v if values_raw else rescaled(self.v_proj, v)
        kept[self.layer_idx] = (prompt, *(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (k, v)))
        return kept[self.layer_idx][1:]

    def _tables(self, linears, rotary, layout: Layout | None, values_raw: bool, x: Tensor, behind=None, raw=False) -> tuple[Tensor, ...]:
        """Projections of x as attention reads them, [B, heads, M, d]: rotated (values apart), and with IA3's factors, except that
        ``values_raw`` leaves l_v to the output. l_k multiplies the key before its rotation: q cannot take it. ``raw``: none is
        rotated. ``behind``: a prefix, which may get rows before the tokens of all three."""
        out, tensors = [], project_together(linears, x)
        if len(tensors) == 3 and not raw and (inputs := self._in_one_pass(tensors, rotary, layout, values_raw, behind)) is not None:
            return inputs
        for linear, t in zip(linears, tensors):
            value = linear is self.v_proj
            t = t if value and values_raw else rescaled(linear, t)
            t = t if value or raw else ops.rotary(t.unflatten(-1, (-1, self.head_dim)), *rotary).flatten(-2)
            t = t if layout is None else layout.pad(t)
            out.append(t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2))
        return tuple(out)

    def _in_one_pass(self, tensors, rotary, layout: Layout | None, values_raw: bool, behind) -> tuple[Tensor, ...] | None:
        """q, k, v [B, heads, M, d] of projections [B, M, .] or [T, .], where a pass for all of them pays."""
        tokens, dense = tensors[0].shape[:-1], layout is not None and layout.place is None
        shape = (layout.rows, layout.columns) if dense else tokens if len(tokens) == 2 else (1, *tokens)
        q, k, v = (t.reshape(*shape, -1, self.head_dim) for t in tensors)
        if not one_pass(q, k):
            return None
        factors = self._factors(values_raw)
        q = q if output_factor(self.q_proj) is None else rescaled(self.q_proj, tensors[0]).view_as(q)
        behind = behind if dense or layout is None else None
        if behind is not None and not reserved_pays(*(t.transpose(1, 2) for t in (q, k, v)), True, None):
            behind = None
        tables = [t.squeeze(-2) for t in rotary]  # [B or 1, M, rot] or [T, rot]
        tables = [t.expand(*tokens, -1).reshape(*shape, -1) if dense or t.dim() == 2 else t for t in tables]
        inputs = ops.attention_inputs(q, k, v, rotary=tuple(tables), ia3=factors, prefix=behind, rows_for_queries=True)
        return inputs if layout is None or dense else tuple(self._padded(layout, t) for t in inputs)

    def _factors(self, values_raw: bool) -> tuple[Tensor | None, Tensor | None]:
        """(l_k, l_v), each [H_kv, d], None where there is none; l_v where it is not the output's."""
        factors = (output_factor(self.k_proj), None if values_raw else output_factor(self.v_proj))
        return tuple(l if l is None else l.view(-1, self.head_dim) for l in factors)

    @staticmethod
    def _padded(layout: Layout, t: Tensor) -> Tensor:
        """[B or 1, heads, M, d] of tokens -> [rows, heads, columns, d]."""
        by_token = t.transpose(1, 2)
        return layout.pad(by_token.flatten(2)).unflatten(-1, by_token.shape[2:]).transpose(1, 2)

    def _per_query_head(self, l: Tensor) -> Tensor:
        """[H_kv d] -> [H d]."""
        return l.view(-1, 1, self.head_dim).expand(-1, self.num_key_value_groups, -1).flatten()
