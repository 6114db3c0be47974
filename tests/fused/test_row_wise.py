"""Whether code treats every token by itself, and whether a layer can be made to hand on where tokens lie."""

import pytest
import torch
from torch import nn

from fastpeft.fused.stack.last_layer import handing_on
from fastpeft.fused.stack.row_wise import is_row_wise_code


def mixing(body):
    """A class of transformers' whose forward has this body."""
    import linecache

    source = f"def forward(self, hidden_states, attention_mask=None, **kwargs):\n    {body}\n"
    name = f"<{hash(body)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space = {"torch": torch, "nn": nn, "__name__": "transformers.test"}
    exec(compile(source, name, "exec"), space)
    return type("Mixing", (nn.Module,), {"forward": space["forward"]})


@pytest.mark.parametrize(
    "body, known",
    [
        ("return self.act_fn(hidden_states) * 2 + hidden_states", True),
        ("return hidden_states.pow(2).mean(-1, keepdim=True)", True),
        ("a, b = hidden_states.chunk(2, dim=-1); return torch.cat((b, a), dim=-1)", True),
        ("return hidden_states.mean(1, keepdim=True)", False),
        ("return hidden_states - hidden_states.mean()", False),
        ("return torch.cat((hidden_states, hidden_states), dim=1)", False),
        ("return hidden_states.cumsum(1)", False),
        ("return hidden_states + torch.arange(hidden_states.shape[1])[:, None]", False),
        ("return hidden_states[:, :1]", False),
        ("return self.act_fn(hidden_states.transpose(1, 2)).transpose(1, 2)", False),
        ("return hidden_states.view(-1, 4)", False),
        ("shape = hidden_states.shape; x = hidden_states.reshape(-1, hidden_states.size(-1)); return self.act_fn(x).view(shape)", True),
        ("shape = hidden_states.mT.shape; return hidden_states.view(shape)", False),
        ("x = hidden_states.chunk(2, dim=-1)[0]; return x.reshape(-1, hidden_states.size(-1))", False),
        ("return hidden_states @ hidden_states", False),
        ("return hidden_states * attention_mask", False),
        ("return attention_interface(self, hidden_states, attention_mask)", False),
        ("return attention_interface(self, hidden_states, attention_mask, **kwargs)", True),
        ("return attention_interface(self, hidden_states, attention_mask.bool(), **kwargs)", False),
        ("return attention_interface(self, hidden_states, None, **kwargs)", False),
        ("return self.act_fn(hidden_states, attention_mask=attention_mask, **kwargs)", True),
        ("return self.act_fn(hidden_states, attention_mask=attention_mask)", False),
        ("return self.forward(hidden_states, attention_mask)", False),
        ("return self.act_fn(hidden_states, attention_mask=attention_mask.bool(), **kwargs)", False),
        ("return [x for x in hidden_states]", False),
        ("return self.a_function(hidden_states)", False),
        ("return self.not_there(hidden_states) if self.training else hidden_states", True),
        ("return torch.stack([-hidden_states, hidden_states], dim=-1).flatten(-2)", True),
        ("return torch.stack([-hidden_states, hidden_states], dim=0)", False),
        ("return hidden_states.flatten(1)", False),
    ],
)
def test_what_code_treats_every_token_by_itself(body, known):
    module = mixing(body)()
    module.act_fn, module.a_function = nn.SiLU(), torch.nn.functional.silu
    assert is_row_wise_code(module) == known


def test_what_a_layer_can_be_made_to_hand_on():
    """To a module that takes it; not to a method of its own, and not where its own arguments end."""
    for body, known in (
        ("return self.act_fn(hidden_states, attention_mask=attention_mask)", True),
        ("return self.narrow(hidden_states, attention_mask=attention_mask)", False),
        ("return self.forward(hidden_states, attention_mask)", False),
        ("return self.act_fn(hidden_states, attention_mask.bool())", False),
    ):
        module = mixing(body)()
        module.act_fn, module.narrow = nn.Identity(), nn.SiLU()
        module.act_fn.forward = lambda hidden_states, **kwargs: (hidden_states, kwargs)
        assert is_row_wise_code(module, layer=True) == known, body
        assert not is_row_wise_code(module)
    forward = handing_on(mixing("return self.act_fn(hidden_states, attention_mask=attention_mask)"))
    assert forward(module, 1, attention_mask=2, other=3) == (1, {"attention_mask": 2, "other": 3})
    assert handing_on(mixing("return self.act_fn(hidden_states, attention_mask=attention_mask, **kwargs)")) is None


def test_code_of_others_is_not_read():
    class Mine(nn.Module):
        def forward(self, hidden_states):
            return hidden_states

    assert not is_row_wise_code(Mine())
