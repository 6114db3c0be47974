"""Gradients of a plan against the same adapters run by PEFT on transformers' own modules."""

import pytest
import torch

import fastpeft as fp
from fastpeft.models import parts_of


@pytest.fixture
def same_gradients_as_peft(miss, tmp_path):
    peft = pytest.importorskip("peft")

    def check(plan, tolerance=1e-9, **options):
        model, inputs = miss.build(plan, **options), miss.batch()
        folder = fp.save_adapter(model, tmp_path / "adapter")
        theirs = miss.plain(miss.build())
        paths = {part: path for part, path in miss.PARTS.items() if (folder / part).is_dir()}
        for part, path in paths.items():
            wrapped = peft.PeftModel.from_pretrained(theirs.get_submodule(path), folder / part, is_trainable=True)
            setattr(theirs, path, wrapped)
        for part in miss.PARTS.keys() - paths.keys():
            theirs.get_submodule(miss.PARTS[part]).requires_grad_(False)
        for network in (miss.without_dropout(model), miss.without_dropout(theirs)):
            network(**inputs).loss.backward()
            with torch.no_grad():  # both name their tensors as PEFT does on disk: let those be the gradients
                for parameter in network.parameters():
                    if parameter.requires_grad:
                        parameter.copy_(parameter.grad)
        for part in parts_of(model):
            if part.name in paths:
                (method,) = model.fastpeft_plan.treatments[part.name]
                got = method.tensors(part.of(model), part)
                want = peft.get_peft_model_state_dict(getattr(theirs, part.path))
                miss.assert_same(got, dict(want), tolerance)
                assert max(t.abs().max() for t in want.values()) > 0

    return check
