"""Modules of transformers and PEFT on fastpeft's operators: the same parameters and names, another forward."""
