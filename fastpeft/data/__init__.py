"""Data sets as published, to batches: formats, images, tokens, samplers."""

from fastpeft.data.formats import load_samples
from fastpeft.data.images import ImageCache, Preprocess, load_image
from fastpeft.data.samples import Sample, SampleList, hold_out, normalise_answer
from fastpeft.data.tokenizer import decode, encode_answers, encode_questions, load_tokenizer, save_tokenizer, train_tokenizer
from fastpeft.data.vqa import EpochSampler, VQACollator, VQADataset

__all__ = [
    "EpochSampler",
    "ImageCache",
    "Preprocess",
    "Sample",
    "SampleList",
    "VQACollator",
    "VQADataset",
    "decode",
    "encode_answers",
    "encode_questions",
    "hold_out",
    "load_image",
    "load_samples",
    "load_tokenizer",
    "normalise_answer",
    "save_tokenizer",
    "train_tokenizer",
]
