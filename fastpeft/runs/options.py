"""Options of runs: the model and its adapters, the data, how a language model reads text, how answers are generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from fastpeft import options as declared
from fastpeft.options import Count, FilePath, Fraction, Option, Positive, Text, options
from fastpeft.train.config import TrainConfig

METHOD, READ, PROMPT, SCORE = (Option(panel=name) for name in ("Model and method", "Data", "Language models", "Generation"))
MEASURE = Option(panel="Metrics of text")
METRICS = ("rouge", "meteor", "bertscore", "tokens")
Names = tuple[str, ...] | None
Formats = Annotated[Text | tuple[str, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
Stages = Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]


@options
class DataSource:
    """One of the data sets that a run mixes."""

    path: FilePath
    "Folder, or annotation file."
    weight: Positive | None = None
    "Its share of an epoch's samples, beside the others' weights (default: by size)."
    kind: Text | None = None
    "Its format, where the file's fields should not tell it: alpaca, llava, coco, reports, scienceqa, vqa."
    image_folder: Text = ""
    "What to put before each image's name."
    image_prefix: Text = ""
    "What to put before each image's file name, such as COCO_train2014_."
    turns: Literal["dialogue", "each", "first"] = "dialogue"
    "Turns of a conversation: all in one sample, each a sample of its own, or the first alone."


def _sources(data) -> tuple[DataSource, ...]:
    given = (data,) if isinstance(data, str | dict) else data
    return tuple(declared.split(_spelt(one) if isinstance(one, str) else one, DataSource)[0] for one in given)


_OPTION = re.compile(r",(weight|kind|image_folder|image_prefix|turns)=([^,]*)")


def _spelt(text: str) -> dict[str, Any]:
    """ "DIR,weight=2,turns=first" as options of a DataSource; a comma that no option follows is the path's."""
    found: dict[str, Any] = {}
    while (last := list(_OPTION.finditer(text))) and last[-1].end() == len(text):
        name, value = last[-1].groups()
        try:
            found.setdefault(name, float(value) if name == "weight" else value)
        except ValueError:
            raise ValueError(f"data: weight must be a number above 0, not {value!r}") from None
        text = text[: last[-1].start()]
    return {"path": text} | found


def _listed(value: Any) -> Any:
    """A list as a tuple; one path alone as it is. ValueError for anything else."""
    listed = [str(one) if isinstance(one, Path) else one for one in (value if isinstance(value, list | tuple) else [value])]
    if not listed or any(not isinstance(one, str | dict) or not one for one in listed):
        raise ValueError(f"data must be a path, not {value!r}; or a list of paths, or of mappings with a path")
    return tuple(listed) if len(listed) > 1 else listed[0]


Sources = Annotated[str | dict[str, Any] | tuple[str | dict[str, Any], ...], BeforeValidator(_listed)]


@options
class RunOptions:
    """What is trained: a base, a plan, and the options of the plan's LoRA."""

    model: Annotated[Text, METHOD, Option(names=("model_name_or_path",))] = "miss-tiny"
    "The base: a name (miss, llava-med, llama-7b, excitor-7b, lavin-7b, ... or their -tiny), or a local transformers folder."
    image_encoder: Annotated[Text | None, METHOD] = None
    "Image encoder of a named model that sees through CLIP: B/16, L/14, L/14@336 (default: the model's own)."
    plan: Annotated[Text | dict[str, Any] | None, METHOD, Option(must="a plan such as F/LoRA/LoRA")] = None
    "What each part gets, such as F/LoRA/LoRA, or a YAML file of it (default: that of --init-adapter, or of the model's paper)."
    rank: Annotated[int | None, METHOD, Option(names=("r", "lora_r"))] = None
    "LoRA's rank (default 4)."
    lora_alpha: Annotated[float | None, METHOD] = None
    "Numerator of LoRA's scaling (default 32)."
    lora_dropout: Annotated[float | None, METHOD] = None
    "Dropout on the input of LoRA's branch (default 0)."
    vocab: Annotated[Text | None, METHOD, Option(names=("tokenizer",))] = None
    "Tokenizer folder, or vocab.txt (default: the model's, else learnt from the data)."
    quantize: Annotated[Text | None, METHOD] = None
    "Hold the frozen base in bitsandbytes' format: 4bit or 8bit."
    from_scratch: Annotated[bool, METHOD] = False
    "Begin with random weights, even where the package ships trained ones."
    init_adapter: Annotated[FilePath | None, METHOD] = None
    "Begin with the adapter in this folder, or of this run, of the same base; its plan and options are the default."
    stages: Annotated[Stages | None, METHOD, Option(must="a list of stages, each a mapping of options")] = None
    "Runs in turn, each going on from the one before, with options of its own (in YAML only; see fastpeft.runs.stages)."
    no_eval: Annotated[bool, READ] = False
    "Score nothing at the end."

    def arguments(self) -> dict[str, Any]:
        """What :func:`fastpeft.runs.train.train_run` takes of it beside model, plan and LoRA."""
        more = {"vocab": self.vocab, "quantize": self.quantize, "init_adapter": self.init_adapter, "image_encoder": self.image_encoder}
        return more | {"pretrained": not self.from_scratch, "evaluate": not self.no_eval}

    @property
    def lora(self) -> dict[str, float | None]:
        """Options of the plan's LoRA, under its own names."""
        return {"r": self.rank, "lora_alpha": self.lora_alpha, "lora_dropout": self.lora_dropout}


@options
class DataOptions:
    """Which samples."""

    data: Annotated[Sources, READ, Option(repeats=True, must="a path, or a list of them")]
    """Folder of a data set: Slake, VQA-RAD, MILE, Alpaca, LLaVA, COCO captions, ScienceQA, image and report lists; for eval, MMLU too.
    Several are mixed, each with options of its own: DIR,weight=2,kind=llava,image_folder=train2017,image_prefix=COCO_,turns=first."""
    split_file: Annotated[FilePath | None, READ] = None
    "Annotation file, or a file of qids, to read (default: by the data set's own file names)."
    eval_split_file: Annotated[FilePath | None, READ] = None
    "Annotation file, or a file of qids, to score at the end (default: the data set's test split)."
    hold_out: Annotated[Fraction, READ, Option(says="{name}={value!r}: use a number between 0 and 1, such as 0.1")] = 0.0
    "Hold this fraction of the training images out, and score it instead."
    languages: Annotated[Names, READ, Option(must="a list of q_lang values")] = ("en",)
    "Keep questions of these languages: q_lang values, comma-separated."
    skip_bad: Annotated[bool, READ] = False
    "Leave bad entries out and count them."
    max_pixels: Annotated[Count, READ] = 50_000_000
    "Refuse images of more pixels, before they are decoded."

    def __post_init__(self):
        if self.hold_out and self.eval_split_file:
            raise ValueError("hold_out and eval_split_file both say what to score: give one of them")
        sources = self.sources
        if len(sources) > 1 and (self.split_file or self.eval_split_file):
            raise ValueError(
                "split_file and eval_split_file are of one data set, and data names several: give the annotation files as data"
            )
        if len({source.weight is None for source in sources}) > 1:
            raise ValueError("give a weight to every data set, or to none: then each counts by its size")

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The data sets, at least one."""
        return _sources(self.data)


@options
class TextOptions:
    """How a causal language model's samples become tokens."""

    template: Annotated[Text | None, PROMPT] = None
    """Template of prompts (default: the model's own): alpaca, lavin, plain, scienceqa, or a conversation of LLaVA's or LLaVA-Med's by
    version: llava (v1), v0, v0_train, llava_v0, llava_v1, llama_2, llava_llama_2, mistral_instruct, simple, multimodal, ..."""
    image_place: Annotated[Literal["before", "after", "data"] | None, PROMPT] = None
    "Where a conversation has its image: before or after the first question, or where the data have <image> (default: the template's own)."
    max_length: Annotated[int, Field(ge=2), PROMPT, Option(names=("max_seq_length",))] = 512
    "Cut samples to this many tokens."
    max_question: Annotated[int, Field(ge=3), READ] = 35
    "Cut questions of visual question answering to this many tokens (MISS's 35 cut options off in instruction-format data)."
    packed: Annotated[bool, PROMPT, Option(off="no_packing", names=("packing",))] = True
    "Put samples end to end in one row, instead of padding them."
    instruction: Annotated[Text | None, PROMPT] = None
    "What to ask where the data hold captions or reports only."
    prompt_format: Annotated[Formats, PROMPT] = "QCM-ALE"
    "Parts of ScienceQA's prompt and answer, such as QCM-LEA."
    use_caption: Annotated[bool, PROMPT] = False
    "Give a model that sees no images ScienceQA's captions."
    tell_format: Annotated[bool | None, PROMPT] = None
    "Say in ScienceQA's prompts where the answer alone is wanted (default: where several prompt formats are trained on)."

    def reading(self) -> dict[str, Any]:
        """What of it concerns reading files."""
        tell = self.tell_format if self.tell_format is not None else not isinstance(self.prompt_format, str)
        return {name: getattr(self, name) for name in ("instruction", "prompt_format", "use_caption")} | {"tell_format": tell}


@options
class GenerationOptions:
    """How answers are generated: by beams or greedily, or sampled where top_p or temperature is given."""

    num_beams: Annotated[int | None, Field(ge=1), SCORE] = None
    "Beams of the search (default: 3 for visual question answering, 1 for responses)."
    max_new_tokens: Annotated[int | None, Field(ge=1), SCORE] = None
    "Most tokens of a response (default 128)."
    top_p: Annotated[float | None, Field(ge=0, le=1), SCORE] = None
    "Sample from the likeliest tokens of this probability."
    temperature: Annotated[float | None, Field(ge=0), SCORE] = None
    "Temperature of sampling."

    def chosen(self) -> dict[str, Any]:
        """What was given, as transformers' ``generate`` takes it; beams apart."""
        given = {"max_new_tokens": self.max_new_tokens, "top_p": self.top_p, "temperature": self.temperature}
        given = {name: value for name, value in given.items() if value is not None}
        return given | ({"do_sample": True} if given.keys() & {"top_p", "temperature"} else {})


@options
class MetricOptions:
    """Metrics of generated text, reported beside the accuracies; what one lacks is said, the others are reported."""

    metrics: Annotated[Names, MEASURE, Option(must="a list of metrics: rouge, meteor, bertscore, tokens")] = METRICS
    "Metrics to report, comma-separated: rouge, meteor, bertscore, tokens."
    bertscore_model: Annotated[FilePath | None, MEASURE] = None
    "Local model folder of BERTScore, such as a copy of roberta-large; without it there is no BERTScore."
    bertscore_layer: Annotated[Count | None, MEASURE] = None
    "Layer whose output BERTScore compares (default: bert_score's for a model of the folder's name, else the last)."
    bertscore_idf: Annotated[bool, MEASURE] = False
    "Weigh BERTScore's words by their rarity among the references."
    bertscore_baseline: Annotated[FilePath | None, MEASURE] = None
    "Rescale BERTScore with this file of baselines by layer (of bert_score's rescale_baseline/)."
    wordnet: Annotated[FilePath | None, MEASURE] = None
    "WordNet folder of METEOR (corpora/wordnet of nltk_data); without it METEOR has no synonyms."

    def __post_init__(self):
        if unknown := [name for name in self.metrics or () if name not in METRICS]:
            raise ValueError(f"no metric is called {', '.join(unknown)}; there are {', '.join(METRICS)}")

    def chosen(self) -> dict[str, Any]:
        """Arguments of :func:`fastpeft.evaluate.text_metrics.text_metrics`."""
        return {field.name: getattr(self, field.name) for field in declared.fields(MetricOptions)} | {"metrics": self.metrics or ()}


@options
class MMLUOptions:
    """How MMLU is asked."""

    shots: Annotated[int, Field(ge=0, le=5), SCORE, Option(must="a whole number from 0 to 5")] = 5
    "Development questions of MMLU, with their answers, in each prompt."
    no_base: Annotated[bool, SCORE] = False
    "Ask MMLU of the adapter alone, and not of the base without it as well."


RECIPE = (RunOptions, DataOptions, TextOptions, MetricOptions, TrainConfig)  # what a YAML file of `fastpeft train` may hold


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A recipe of `fastpeft train`, under the options' own names. ValueError names the file and what is wrong."""
    return declared.read_yaml(path, *RECIPE)
