"""Feed-forward blocks on fastpeft's operators.

Two kinds, under the names that model files give their layers: gated ones, down(act(gate(x)) * up(x)), and chains, linear layers with an
activation and dropout between them. What they keep for backward are the outputs of their linear layers: the input of each, an activation or
a product, is formed again.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from fastpeft import ops
from fastpeft.fused.layers.leaves import gelu_kind
from fastpeft.fused.layers.norms import add_norm
from fastpeft.fused.layers.projections import Recomputes, project, project_one
from fastpeft.methods.adapted import linear_spec
from fastpeft.methods.base import has_hooks
from fastpeft.ops.activations import multiply
from fastpeft.registry import fuses, original_class

SILU = (nn.SiLU, SiLUActivation)


class Gate(NamedTuple):
    """Names of a gated unit's modules, '' for none. ``joint``: of one layer that gives both halves, in place of gate and up, the gate first
    unless ``gate_last``. Without ``act`` the activation is SiLU."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    act: str = "act_fn"
    drop: str = ""
    joint: str = ""
    gate_last: bool = False


class _Gated(Recomputes):
    """down(drop(act(gate(x)) * up(x))), the product in one pass, with IA3's factor on it where there is no dropout."""

    takes_flat_tokens = True
    gated_by = Gate()

    def forward(self, x: Tensor) -> Tensor:
        """[..., C]."""
        names = self.gated_by
        act, drop = (getattr(self, name) if name else None for name in (names.act, names.drop))
        if act is not None and has_hooks(act):
            return super().forward(x)
        if names.joint:
            joint = getattr(self, names.joint)
            gate, up = self.projected(lambda x: project_one(joint, x).chunk(2, dim=-1), x, (joint,))
            gate, up = (up, gate) if names.gate_last else (gate, up)
        else:
            linears = (getattr(self, names.gate), getattr(self, names.up))
            gate, up = self.projected(partial(project, linears), x, linears)
        down, kind = getattr(self, names.down), None if act is None else gelu_kind(act)
        unit = ops.swiglu if act is None or original_class(act) in SILU else partial(ops.geglu, approximate=kind) if kind else None
        if unit is None or gate.dtype != up.dtype:
            product = multiply(F.silu(gate) if act is None else act(gate), up)
        elif drop is None and (spec := linear_spec(down)) is not None:
            return spec._replace(input_scale=None)(unit(gate, up, spec.input_scale))
        else:
            product = unit(gate, up)
        return project_one(down, self.cast_for_last(product if drop is None else drop(product)))

    def cast_for_last(self, product: Tensor) -> Tensor:
        """``product`` as the last layer takes it."""
        return product


@fuses("transformers.models.llama.modeling_llama.LlamaMLP", code="5ec354412f05")
@fuses("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLMLP", code="fbc0fb3e4051")
class FusedGatedMLP(_Gated):
    pass


@fuses("transformers.models.llama4.modeling_llama4.Llama4TextMLP", code="8ec16d9d7c6c")
class FusedLlama4MLP(_Gated):
    gated_by = Gate(act="activation_fn")


@fuses("transformers.models.t5gemma.modeling_t5gemma.T5GemmaMLP", code="20bcaf26d430")
class FusedDroppedGatedMLP(_Gated):
    gated_by = Gate(drop="dropout")


@fuses("transformers.models.recurrent_gemma.modeling_recurrent_gemma.RecurrentGemmaMlp", code="a2d5acb49ffc")
class FusedRecurrentGemmaMLP(_Gated):
    pass


@fuses("transformers.models.phi3.modeling_phi3.Phi3MLP", code="4ae068efee74")
class FusedPhi3MLP(_Gated):
    gated_by = Gate(joint="gate_up_proj", act="activation_fn")


@fuses("transformers.models.granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedMLP", code="15b6537b892d")
class FusedGraniteMLP(_Gated):
    gated_by = Gate(joint="input_linear", act="activation", down="output_linear")


@fuses("transformers.models.moonshine.modeling_moonshine.MoonshineDecoderMLP", code="7f18d7638d1c")
class FusedMoonshineMLP(_Gated):
    gated_by = Gate(joint="fc1", act="activation_fn", down="fc2", gate_last=True)


@fuses("transformers.models.modernbert.modeling_modernbert.ModernBertMLP", code="61547741ac21")
class FusedModernBertMLP(_Gated):
    gated_by = Gate(joint="Wi", act="act", drop="drop", down="Wo")


@fuses("transformers.models.lfm2.modeling_lfm2.Lfm2MLP", code="d07bc6a0501a")
class FusedLfm2MLP(_Gated):
    gated_by = Gate(gate="w1", up="w3", down="w2", act="")


class _Float32Last:
    """T5's last layer may be kept in float32: what it takes is cast to its weight's dtype."""

    def cast_for_last(self, product: Tensor) -> Tensor:
        weight = self.wo.weight
        odd = isinstance(weight, Tensor) and product.dtype != weight.dtype and weight.dtype != torch.int8
        return product.to(weight.dtype) if odd else product


@fuses("transformers.models.t5.modeling_t5.T5DenseGatedActDense", code="44304f3f6ca5")
class FusedT5GatedMLP(_Float32Last, _Gated):
    gated_by = Gate(gate="wi_0", up="wi_1", down="wo", act="act", drop="dropout")


@fuses("transformers.models.longt5.modeling_longt5.LongT5DenseGatedActDense", code="cfd0dc87755f")
class FusedLongT5GatedMLP(_Gated):
    gated_by = Gate(gate="wi_0", up="wi_1", down="wo", act="act", drop="dropout")


class _Chain(Recomputes):
    """Modules one after another, the first a linear layer. A step in parentheses is dropout by the probability of that name."""

    takes_flat_tokens = True
    chained: tuple[str, ...] = ()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., C]."""
        first, *steps = self.chained
        linear = getattr(self, first)
        (hidden_states,) = self.projected(lambda x: (project_one(linear, x),), hidden_states, (linear,))
        for step in steps:
            if step.startswith("("):
                hidden_states = ops.dropout(hidden_states, getattr(self, step[1:-1]), self.training)
            else:
                hidden_states = project_one(getattr(self, step), self.cast_for_last(hidden_states) if step == steps[-1] else hidden_states)
        return hidden_states

    def cast_for_last(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` as the last step takes them."""
        return hidden_states

    @classmethod
    def why_not(cls, module: nn.Module) -> str:
        """'' or why this one stays as it is."""
        every = (step[1:-1] for step in cls.chained if step.startswith("("))
        return next((f"its {name} is {p}" for name in every if not 0 <= (p := getattr(module, name)) < 1), "")


# Chains under their names: (class, an example, digest, steps)
CHAINS = (
    ("FusedMLP", "clip.modeling_clip.CLIPMLP", "f36d700d254b", "fc1 activation_fn fc2"),
    ("FusedIntermediate", "bert.modeling_bert.BertIntermediate", "c488880e1596", "dense intermediate_act_fn"),
    ("FusedUpDownMLP", "nemotron.modeling_nemotron.NemotronMLP", "b2dda753c67b", "up_proj act_fn down_proj"),
    ("FusedQwenVisionMLP", "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionMLP", "5a6c7c8cd494", "linear_fc1 act_fn linear_fc2"),
    ("FusedVisionMLP", "qwen2_vl.modeling_qwen2_vl.VisionMlp", "019e3c3e80b2", "fc1 act fc2"),
    ("FusedVJEPA2MLP", "vjepa2.modeling_vjepa2.VJEPA2MLP", "21eb7bb10fed", "fc1 activation fc2"),
    ("FusedGPT2MLP", "gpt2.modeling_gpt2.GPT2MLP", "09015a424efe", "c_fc act c_proj dropout"),
    ("FusedGPTJMLP", "gptj.modeling_gptj.GPTJMLP", "ec6e1722c0de", "fc_in act fc_out dropout"),
    ("FusedGPTNeoXMLP", "gpt_neox.modeling_gpt_neox.GPTNeoXMLP", "20a940192415", "dense_h_to_4h act dense_4h_to_h"),
    ("FusedJapaneseMLP", "gpt_neox_japanese.modeling_gpt_neox_japanese.GPTNeoXJapaneseMLP", "c27c86b87ad2",
     "dense_h_to_4h act dense_4h_to_h"),
    ("FusedAudioFeedForward", "wav2vec2.modeling_wav2vec2.Wav2Vec2FeedForward", "8cb879114d6c",
     "intermediate_dense intermediate_act_fn intermediate_dropout output_dense output_dropout"),
    ("FusedDetrMLP", "detr.modeling_detr.DetrMLP", "745bb644ec59", "fc1 activation_fn (activation_dropout) fc2 (dropout)"),
    ("FusedConformerMLP", "parakeet.modeling_parakeet.ParakeetEncoderFeedForward", "ab67c6d8d2d5",
     "linear1 activation (activation_dropout) linear2"),
    ("FusedFocalMLP", "focalnet.modeling_focalnet.FocalNetMlp", "d015fc54e719", "fc1 activation drop fc2 drop"),
    ("FusedViTDetMLP", "vitdet.modeling_vitdet.VitDetMlp", "ac774ea3235c", "fc1 act drop fc2 drop"),
    ("FusedVibeVoiceMLP", "vibevoice_asr.modeling_vibevoice_asr.VibeVoiceAsrFeedForward", "c49dfd46aa9a", "linear1 activation linear2"),
    ("FusedPerceiverMLP", "perceiver.modeling_perceiver.PerceiverMLP", "272364547c1c", "dense1 intermediate_act_fn dense2"),
    ("FusedPvtMLP", "pvt.modeling_pvt.PvtFFN", "22489955325c", "dense1 intermediate_act_fn dropout dense2 dropout"),
    ("FusedTimesformerIntermediate", "timesformer.modeling_timesformer.TimesformerIntermediate", "bdb9f36086e6",
     "dense intermediate_act_fn dropout"),
    ("FusedSam3MLP", "sam3.modeling_sam3.Sam3MLP", "39c42dd4a24a", "fc1 dropout activation_fn fc2"),
    ("FusedProphetNetMLP", "prophetnet.modeling_prophetnet.ProphetNetFeedForward", "f8d4bc773748",
     "intermediate activation_fn (activation_dropout) output (dropout)"),
    ("FusedSegGptMLP", "seggpt.modeling_seggpt.SegGptMlp", "99f046ce6cfe", "lin1 act lin2"),
)  # fmt: skip
for _name, _path, _code, _steps in CHAINS:
    _body = {"chained": tuple(_steps.split()), "__module__": __name__, "__doc__": _Chain.__doc__}
    globals()[_name] = fuses(f"transformers.models.{_path}", code=_code)(type(_name, (_Chain,), _body))


@fuses("transformers.models.t5.modeling_t5.T5DenseActDense", code="0abe7eec0823")
class FusedT5MLP(_Float32Last, _Chain):
    chained = ("wi", "act", "dropout", "wo")


@fuses("transformers.models.bert.modeling_bert.BertOutput", code="4c9f38def3c7")
class FusedAddNormOutput:
    """norm(dropout(dense(x)) + residual), the sum formed once, inside the norm."""

    takes_flat_tokens = True

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Both [..., C]."""
        return add_norm(self.dropout(project_one(self.dense, hidden_states)), input_tensor, self.LayerNorm)[0]
