"""Fused modules by role: norms, mlp, attention, layers, experts, stacks, head, leaves, PEFT's layers. Importing the package registers all
of them (:mod:`fastpeft.registry`); no file imports the classes that its modules replace."""

from fastpeft.fused import (  # noqa: F401
    any_head,
    any_stack,
    attention_interface,
    attention_llama,
    attention_text,
    attention_vision,
    experts,
    head,
    layers,
    leaves,
    mlp,
    norms,
    peft_layers,
    pooled,
    stack_blip,
    stack_llama,
    token_classifiers,
    unread_layers,
)
