"""Fused modules by role: what layers are made of, attention, stacks, heads, PEFT's layers. Importing the package registers all of them
(:mod:`fastpeft.registry`); no file imports the classes that its modules replace."""

import fastpeft.fused.attention.blip_text
import fastpeft.fused.attention.interface
import fastpeft.fused.attention.llama
import fastpeft.fused.attention.vision
import fastpeft.fused.head.any_head
import fastpeft.fused.head.models
import fastpeft.fused.head.pooled
import fastpeft.fused.head.token_classifiers
import fastpeft.fused.layers.blocks
import fastpeft.fused.layers.experts
import fastpeft.fused.layers.leaves
import fastpeft.fused.layers.mlp
import fastpeft.fused.layers.norms
import fastpeft.fused.peft_layers
import fastpeft.fused.stack.any_stack
import fastpeft.fused.stack.blip
import fastpeft.fused.stack.llama
import fastpeft.fused.stack.unread_layers  # noqa: F401
