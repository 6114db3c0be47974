"""Data sets: published formats, image preprocessing, tokenizers, batches and samplers."""

from fastpeft.data.causal import CausalDataset
from fastpeft.data.causal_batches import CausalCollator, LengthGroupedSampler
from fastpeft.data.causal_tokenizer import load_causal_tokenizer, train_causal_tokenizer
from fastpeft.data.formats import load_samples
from fastpeft.data.images import ImageCache, Preprocess, load_image
from fastpeft.data.instruct import write_instruction_data
from fastpeft.data.instructions import load_instructions
from fastpeft.data.samples import Instruction, Sample, SampleList, hold_out, mix, normalise_answer
from fastpeft.data.scienceqa import load_scienceqa
from fastpeft.data.shared_prefix import SharedPrefixCollator
from fastpeft.data.tokenizer import decode, encode_answers, encode_questions, load_tokenizer, save_tokenizer, train_tokenizer
from fastpeft.data.vqa import EpochSampler, VQACollator, VQADataset

__all__ = [
    "CausalCollator",
    "CausalDataset",
    "EpochSampler",
    "ImageCache",
    "Instruction",
    "LengthGroupedSampler",
    "Preprocess",
    "Sample",
    "SampleList",
    "SharedPrefixCollator",
    "VQACollator",
    "VQADataset",
    "decode",
    "encode_answers",
    "encode_questions",
    "hold_out",
    "load_causal_tokenizer",
    "load_image",
    "load_instructions",
    "load_samples",
    "load_scienceqa",
    "load_tokenizer",
    "mix",
    "normalise_answer",
    "save_tokenizer",
    "train_causal_tokenizer",
    "train_tokenizer",
    "write_instruction_data",
]
