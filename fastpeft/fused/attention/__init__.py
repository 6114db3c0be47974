"""Attention on fastpeft's operators: of any model by transformers' interface, LLaMA's, BLIP's, vision encoders'."""
