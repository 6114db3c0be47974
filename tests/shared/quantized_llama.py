"""A small LLaMA as each library quantises it, with a stand-in for torchao's tensors.

Test files import ``llama_folder`` (the fixture ``folder``) and ``torchao_or_its_stand_in`` as fixtures."""

import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 90}


class StandIn(torch.Tensor):
    """A weight of int8 codes and a scale an output that says itself what it is in full, as torchao's are: for where torchao is not."""

    @staticmethod
    def __new__(cls, codes, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes, scale, dtype):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], self.dtype

    def dequantize(self):
        return (self.codes * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func.overloadpacket in (torch.ops.aten.detach, torch.ops.aten.clone), func  # ops may only take it written out
        mine = args[0]
        return cls(func(mine.codes), func(mine.scale), mine.dtype)


@pytest.fixture(autouse=True)
def torchao_or_its_stand_in(request, monkeypatch):
    if "standin" in request.node.name:
        monkeypatch.setitem(sys.modules, "torchao.utils", types.SimpleNamespace(TorchAOBaseTensor=StandIn))


def bnb_config(bits, **more):
    from transformers import BitsAndBytesConfig

    pytest.importorskip("bitsandbytes")
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(load_in_4bit=True, **four | more) if bits == "4bit" else BitsAndBytesConfig(load_in_8bit=True)


def ao_config():
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


FORMATS = {
    "standin": lambda: None,
    "4bit": lambda: bnb_config("4bit"),
    "fp4": lambda: bnb_config("4bit", bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False),
    "8bit": lambda: bnb_config("8bit"),
    "torchao": ao_config,
}


@pytest.fixture(scope="module", name="folder")
def llama_folder(tmp_path_factory):
    """A small LLaMA as transformers saves it."""
    torch.manual_seed(0)
    model, where = LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)), tmp_path_factory.mktemp("llama")
    model.save_pretrained(where)
    return where


def loaded(folder, how, dtype=torch.float32):
    """As a user loads it."""
    if how == "standin":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for layer in (m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"):
            scale = layer.weight.detach().float().abs().amax(1, keepdim=True) / 127
            codes = (layer.weight.detach() / scale).round().to(torch.int8)
            layer.weight = nn.Parameter(StandIn(codes, scale, dtype), requires_grad=False)
        return model
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FORMATS[how](), dtype=dtype)


def batch():
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where((torch.arange(12) > 5) & mask.bool(), ids, -100)}


def logits_of(model):
    """At real tokens."""
    inputs = batch()
    with torch.no_grad():
        return model.eval()(**inputs).logits[inputs["attention_mask"].bool()]
