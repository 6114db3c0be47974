"""Whether the code of a class treats every token by itself: what it returns for a token depends on that token, and on nothing else.

A forward is read as a tree. It may call its own modules (which are looked at for themselves), add, multiply, cast, and reduce or cut over
the last dimension, in its own methods and in functions of its file too. An attention layer may call its attention function once, with the
mask that it was given and all its keyword arguments: that function is told where tokens lie. Anything else, a loop, an ``arange``, a mean
over positions, makes a class unknown, but for those whose code was read by people (:data:`READ`).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterable
from types import FunctionType

from torch import nn

from fastpeft.forms import as_written, cache_by_forward, digest, home_of
from fastpeft.fused.attention.interface import reads_interface
from fastpeft.fused.attention.tokens import KEY_STATES
from fastpeft.fused.layers.shared_input import tree_of
from fastpeft.registry import original_class

ANYWHERE = frozenset((
    "contiguous", "unsqueeze", "to", "float", "type", "type_as", "pow", "square", "rsqrt", "sqrt", "clamp", "clone", "size",
    "get_interface", "add", "mul", "div", "neg", "abs", "silu", "gelu", "relu", "sigmoid", "tanh", "sin", "cos", "exp", "log", "floor",
    "dropout", "layer_norm", "clamp_",
))  # fmt: skip
IN_ATTENTION = ANYWHERE | {"view", "reshape", "transpose", "flatten"}  # elsewhere they may put tokens where channels were
LAST = frozenset(("mean", "sum", "cat", "chunk", "split", "softmax", "norm", "var", "stack", "repeat_interleave"))  # need dim=-1
PLAIN = frozenset(("getattr", "isinstance", "len", "int", "float", "tuple", "max", "min"))
FORBIDDEN = (ast.For, ast.While, ast.AsyncFor, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.Lambda, ast.Yield,
             ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal, ast.With, ast.Try, ast.Delete, ast.MatMult)  # fmt: skip
ATTENTION = "attention_interface"
MASK = "attention_mask"

# Digests of code that is row-wise and that the rules above do not see through, each with a class that has it. Mixtures of experts: routers
# choose experts for each token, experts compute pairs of token and expert in an order of their own.
READ = {
    "c32fb73ddbf6": "mixtral.modeling_mixtral.MixtralTopKRouter",
    "a3edff8061b4": "qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter",
    "83222ec6d585": "qwen3_vl_moe.modeling_qwen3_vl_moe.Qwen3VLMoeTextTopKRouter",
    "d748e3d64a68": "deepseek_v3.modeling_deepseek_v3.DeepseekV3TopkRouter",
    "ecc85144a8b4": "granitemoe.modeling_granitemoe.GraniteMoeTopKRouter",
    "12cd21d954f1": "granitemoe.modeling_granitemoe.GraniteMoeTopKRouter",  # to transformers 5.17
    "2aa2a176027a": "gpt_oss.modeling_gpt_oss.GptOssTopKRouter",
    "b1d632ccf62c": "nemotron.modeling_nemotron.NemotronLayerNorm1P",
    "10a67bc6ec22": "nemotron.modeling_nemotron.NemotronLayerNorm1P",  # to transformers 5.17
    "d2c052bd2453": "mixtral.modeling_mixtral.MixtralExperts",
    "1fa971a82665": "mixtral.modeling_mixtral.MixtralExperts",  # to transformers 5.17
    "02814d650b5f": "gpt_oss.modeling_gpt_oss.GptOssExperts",
    "a0f9b479e16b": "mixtral.modeling_mixtral.MixtralSparseMoeBlock",
    "fcbfafa44650": "qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock",
    "9c6da855494e": "qwen2_moe.modeling_qwen2_moe.Qwen2MoeSparseMoeBlock",
    "23086ecf74b2": "olmoe.modeling_olmoe.OlmoeSparseMoeBlock",
    "bd955c1b463e": "deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",
    "88ea07a7977c": "granitemoe.modeling_granitemoe.GraniteMoeMoE",
    "038b3806a55a": "granitemoe.modeling_granitemoe.GraniteMoeMoE",  # to transformers 5.17
    "0490faf6abfe": "gpt_oss.modeling_gpt_oss.GptOssMLP",
    "28f2ad5dd041": "afmoe.modeling_afmoe.AfmoeSparseMoeBlock",
    "e2eeb571a9df": "cohere2_moe.modeling_cohere2_moe.Cohere2MoeSparseMoeBlock",
    "b6c1aa07e5e3": "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock",
    "842111a059d7": "hy_v3.modeling_hy_v3.HYV3MoE",
    "16d306d417c6": "mimo_v2_flash.modeling_mimo_v2_flash.MiMoV2FlashMoE",
    "5171e628bad1": "minimax_m2.modeling_minimax_m2.MiniMaxM2SparseMoeBlock",
    "cb2baff6950c": "deepseek_v2.modeling_deepseek_v2.DeepseekV2TopkRouter",
    "4180b9f44953": "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeTopKRouter",
    "4f36d2a8035c": "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeTopKRouter",  # to transformers 5.17
    "86d8fd53afec": "ernie4_5_moe.modeling_ernie4_5_moe.Ernie4_5_MoeStatics",
    "efc0f529fc2e": "minimax_m2.modeling_minimax_m2.MiniMaxM2TopKRouter",
    "e9a73cfd066d": "afmoe.modeling_afmoe.AfmoeTokenChoiceRouter",
    "ef9504dc72a0": "cohere2_moe.modeling_cohere2_moe.Cohere2MoeTopKRouter",
    "390435cbdaf5": "hy_v3.modeling_hy_v3.HYV3TopKRouter",
    "209a8291c946": "gpt2.modeling_gpt2.GPT2Block",  # without an encoder's states, which no stack hands on beside a layout
    "51bcf498504d": "gpt2.modeling_gpt2.GPT2Attention",
    "d2921592ab53": "bert.modeling_bert.BertLayer",  # and RoBERTa's, ELECTRA's, ...; cross-attention as above
    "904e4ed3230c": "layoutlm.modeling_layoutlm.LayoutLMLayer",
    "073cce2d00eb": "distilbert.modeling_distilbert.FFN",
    "f988069ac732": "bloom.modeling_bloom.BloomMLP",
    "0a680db82691": "bloom.modeling_bloom.BloomGelu",
    "056c7a7d6f6f": "xlm_roberta_xl.modeling_xlm_roberta_xl.XLMRobertaXLLayer",
    "c998de6e6c89": "bert.modeling_bert.BertAttention",
    "9b68fa4aeb9c": "xlm_roberta_xl.modeling_xlm_roberta_xl.XLMRobertaXLAttention",
    "b0db8fa75d2d": "roberta_prelayernorm.modeling_roberta_prelayernorm.RobertaPreLayerNormAttention",
    "bee0b58e9710": "bert.modeling_bert.BertSelfAttention",
    # Attentions that hand queries, keys and values of each token to their function, once. Cross-attention as above.
    "75712120c07f": "deepseek_v2.modeling_deepseek_v2.DeepseekV2Attention",
    "8670a021ed3f": "deepseek_v3.modeling_deepseek_v3.DeepseekV3Attention",
    "3bafd2c542e9": "minicpm3.modeling_minicpm3.MiniCPM3Attention",
    "cb3036ffab30": "ministral3.modeling_ministral3.Ministral3Attention",
    "c65fcfe337c7": "ministral3.modeling_ministral3.Ministral3Attention",  # to transformers 5.17
    "b2bf4d08995e": "stablelm.modeling_stablelm.StableLmAttention",
    "7ff6f0eb0d66": "persimmon.modeling_persimmon.PersimmonAttention",
    "47953bbcba2e": "laguna.modeling_laguna.LagunaAttention",
    "c1296bfc0eb2": "bart.modeling_bart.BartAttention",
    "b6a2c45cca53": "whisper.modeling_whisper.WhisperAttention",
    "ba67cb207a67": "speech_to_text.modeling_speech_to_text.Speech2TextAttention",
    "dbcab0706ce2": "t5gemma.modeling_t5gemma.T5GemmaCrossAttention",
    "2fc8dd129ac6": "t5.modeling_t5.T5Attention",  # given a position bias
    # Layers of encoder-decoders, but for float16.
    "4ab550002f24": "bart.modeling_bart.BartEncoderLayer",
    "29bf216e4c76": "mbart.modeling_mbart.MBartEncoderLayer",
    "af96f2f0a421": "t5.modeling_t5.T5Block",
}
# Of these, the ones that look, in float16, whether any token of the batch is infinite.
IN_FLOAT16 = frozenset(("4ab550002f24", "29bf216e4c76", "af96f2f0a421"))
# what such code does only where an attribute is set: noise on a batch's hidden states, attention of a model's own, chunks of tokens
UNLESS = ("jitter_noise", "reorder_and_upcast_attn", "chunk_size_feed_forward")


def is_row_wise_code(module: nn.Module, layer: bool = False) -> bool:
    """Whether the forward of ``module``'s class, or of the class that it replaces, is known to be row-wise but for the modules it calls.
    ``layer``: a stack's own, which may be made to hand on where tokens lie (:func:`fastpeft.fused.stack.last_layer.handing_on`)."""
    cls = original_class(module)
    if digest(cls) in READ:
        return not any(getattr(module, name, False) for name in UNLESS)
    known = _known(cls)
    if known is None:
        return False
    called, silent = known
    if silent and not (layer and all(_takes_rest(getattr(module, name, None)) for name in silent)):
        return False
    # what is not there is not called: a norm that this configuration does without
    return all(isinstance(getattr(module, name, None), nn.Module | None) for name in called)


@cache_by_forward
def _known(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str]] | None:
    """(the modules that a forward calls, those of them that get the mask and not where tokens lie), None: it is not row-wise."""
    reader = _Reader(cls)
    return (frozenset(reader.called), frozenset(reader.silent)) if reader.accepts(cls.forward) else None


def mixes_in_float16(layers: Iterable[nn.Module]) -> bool:
    """Whether a layer of a stack looks at a batch's tokens together where hidden states are float16."""
    return any(digest(cls) in IN_FLOAT16 for cls in {original_class(layer) for layer in layers})


def hands_states_on(layer: nn.Module) -> bool:
    """Whether what is in a layer hands all keyword arguments, which say where tokens lie, to whatever it hands an encoder's states."""
    return all(_hands_states_on(cls) for cls in {original_class(module) for module in layer.modules()})


@cache_by_forward
def _hands_states_on(cls: type[nn.Module]) -> bool:
    names = [name for name in KEY_STATES if name in inspect.signature(cls.forward).parameters]
    if not names or reads_interface(cls):  # attention: it projects them
        return True
    tree = tree_of(as_written(cls.forward))
    if tree is None or tree.args.kwarg is None:
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and any(_handed(node, name) for name in names)]
    return all(_hands(call, tree.args.kwarg.arg) for call in calls)


def _takes_rest(module: nn.Module | None) -> bool:
    return module is not None and any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())


class _Reader:
    """Reads what a class's forward reaches. ``called``: attributes of ``self`` that it calls and the class does not have; ``silent``: of
    them, those that get the mask and no ``**``."""

    def __init__(self, cls: type[nn.Module]):
        self.cls, self.seen, self.called, self.silent = cls, set(), set(), set()

    def accepts(self, function: Callable) -> bool:
        function = as_written(function)
        if function in self.seen:
            return True
        self.seen.add(function)
        if not isinstance(function, FunctionType) or not home_of(function).startswith("transformers."):
            return False
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, SyntaxError, IndexError):
            return False
        return isinstance(tree, ast.FunctionDef) and self._accepts_tree(function, tree)

    def _accepts_tree(self, function: FunctionType, tree: ast.FunctionDef) -> bool:
        nodes = [node for statement in tree.body for node in ast.walk(statement)]
        calls = [node for node in nodes if isinstance(node, ast.Call)]
        attends = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == ATTENTION]
        allowed = IN_ATTENTION if attends else ANYWHERE
        if any(isinstance(node, FORBIDDEN) for node in nodes) or not _mask_is_handed_on(nodes, calls, attends, tree):
            return False
        kept = all(_keeps_tokens(node) for node in nodes if isinstance(node, ast.Subscript))
        same = {id(node) for node in calls if _keeps_rows(node, nodes)}
        return kept and all(id(node) in same or self._accepts_call(function, node, allowed) for node in calls)

    def _accepts_call(self, function: FunctionType, call: ast.Call, allowed: frozenset[str]) -> bool:
        called = call.func
        if isinstance(called, ast.Name):
            if called.id in PLAIN or called.id == ATTENTION:
                return True
            found = function.__globals__.get(called.id)
            activates = type(found).__module__ == "transformers.activations"  # RoBERTa's gelu = ACT2FN["gelu"]
            return activates or (isinstance(found, FunctionType) and self.accepts(found))
        if not isinstance(called, ast.Attribute):
            return False
        if isinstance(called.value, ast.Name) and called.value.id == "self":
            found = inspect.getattr_static(self.cls, called.attr, None)
            if found is None:
                self.called.add(called.attr)
                self.silent |= {called.attr} if is_silent(call) else set()
                return True
            function = None if is_silent(call) else getattr(found, "__func__", found)
            return isinstance(function, FunctionType) and self.accepts(function)
        if called.attr == "update":  # of a cache: there is none where tokens are flattened
            return isinstance(called.value, ast.Name) and called.value.id.startswith(("past_key_value", "layer_past"))
        if called.attr == "flatten" and len(call.args) == 1 and not call.keywords and _is_number(call.args[0], -2):
            return True  # of pairs side by side, as interleaved rotary embedding makes them
        if called.attr in LAST:
            return _over_last(call)
        return called.attr in allowed


def _mask_is_handed_on(nodes: list[ast.AST], calls: list[ast.Call], attends: list[ast.Call], tree: ast.FunctionDef) -> bool:
    """Whether the mask goes to attention, or to what has attention inside, as it is, and nowhere else."""
    told = [call for call in calls if _handed(call, MASK)]
    if attends and (len(attends) > 1 or told != attends):
        return False
    return all(_hands_on(call, tree) for call in told) and _loads(nodes, MASK) == len(told)


def _loads(nodes: Iterable[ast.AST], name: str, how: type[ast.expr_context] = ast.expr_context) -> int:
    return sum(isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, how) for node in nodes)


def _handed(call: ast.Call, name: str) -> int:
    """How often ``name`` is an argument of a call."""
    return _loads([*call.args, *(keyword.value for keyword in call.keywords)], name)


def _hands_on(call: ast.Call, tree: ast.FunctionDef) -> bool:
    """Whether a call gets the mask, and all other keyword arguments of the forward around it, which say where tokens lie; or is silent."""
    rest = tree.args.kwarg.arg if tree.args.kwarg else None
    return rest is not None and _handed(call, MASK) == 1 and (_hands(call, rest) or is_silent(call))


def _hands(call: ast.Call, rest: str) -> bool:
    return [keyword.value.id for keyword in call.keywords if keyword.arg is None and isinstance(keyword.value, ast.Name)] == [rest]


def is_silent(call: ast.AST) -> bool:
    """Whether a node calls a module of ``self`` with the mask, and without a ``**``."""
    if not isinstance(call, ast.Call) or any(keyword.arg is None for keyword in call.keywords) or not _handed(call, MASK):
        return False
    return isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name) and call.func.value.id == "self"


def _over_last(call: ast.Call) -> bool:
    dims = [keyword.value for keyword in call.keywords if keyword.arg == "dim"]
    if not dims and len(call.args) and call.func.attr in ("mean", "sum", "softmax"):
        dims = [call.args[0]]
    return len(dims) == 1 and _is_number(dims[0], -1)


def _keeps_rows(call: ast.Call, nodes: list[ast.AST]) -> bool:
    """Whether a call is ``x.reshape(-1, x.size(-1))``, or ``.view(shape)`` back to a ``shape = x.shape``: rows stay, in their order."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("reshape", "view") or call.keywords:
        return False
    if len(call.args) == 2 and _is_number(call.args[0], -1):
        of = ast.unparse(call.func.value)
        return ast.unparse(call.args[1]) in (f"{of}.size(-1)", f"{of}.shape[-1]")
    if len(call.args) != 1 or not isinstance(call.args[0], ast.Name):
        return False
    assigned = [n for n in nodes if isinstance(n, ast.Assign) and any(_loads(ast.walk(t), call.args[0].id, ast.Store) for t in n.targets)]
    whole = len(assigned) == 1 and isinstance(assigned[0].targets[0], ast.Name)
    shape = assigned[0].value if whole else None
    return isinstance(shape, ast.Attribute) and shape.attr == "shape" and isinstance(shape.value, ast.Name)


def _is_number(node: ast.AST, number: int) -> bool:
    return ast.dump(node) == ast.dump(ast.parse(str(number), mode="eval").body)


def _keeps_tokens(node: ast.Subscript) -> bool:
    """Whether an index takes no tokens out: of a shape, of a tuple by a number, or ``[..., a:b]``."""
    index = node.slice
    if isinstance(node.value, ast.Attribute) and node.value.attr == "shape":
        return True
    if isinstance(index, ast.Tuple):
        first = index.elts[0]
        return isinstance(first, ast.Constant) and first.value is Ellipsis and len(index.elts) == 2
    return isinstance(index, ast.Constant) and isinstance(index.value, int | str) and not isinstance(index.value, bool)
