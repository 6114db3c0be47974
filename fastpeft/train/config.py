"""Options of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastpeft.options import Count, CountOrZero, FilePath, Fraction, Number, Option, Positive, Size, Text, options, split
from fastpeft.savings import SAVINGS

DTYPES = ("fp32", "bf16")
TRACKERS = ("tensorboard", "wandb", "mlflow")  # fastpeft.train.callbacks has a class for each
Dtype = Literal["fp32", "bf16"]
RUN, OPTIMISER, MEMORY, OUTPUT = (Option(panel=name) for name in ("Run", "Optimiser", "Memory", "Output"))
VALIDATE = Option(panel="Validation")

# options that a resumed run may have otherwise: how long, where, and what does not bear on the result
FREE = {
    *("steps", "epochs", "out", "resume", "allow_change", "save_every", "keep_checkpoints", "device", "num_workers", "tensorboard"),
    *("async_save", "worker_timeout", "track", "eval_scores", "shard"),
    *("trace", "progress", "feature_cache", "feature_cache_dir", "feature_cache_memory", "cache_layers", "memory_budget", "without"),
}


@options
class TrainConfig:
    """Options of :class:`fastpeft.Trainer`; the defaults adapt a model, they do not pretrain one. Hugging Face's names are taken too
    (``per_device_train_batch_size``, ``num_train_epochs``, ``warmup_ratio``, ...)."""

    steps: Annotated[Count | None, RUN, Option(names=("max_steps",))] = None
    "Optimiser steps; without them, epochs say how many."
    epochs: Annotated[Positive, RUN, Option(names=("num_train_epochs",), must="a number above 0")] = 1.0
    "Passes over the data, where steps are not given."
    batch_size: Annotated[Count, RUN, Option(names=("per_device_train_batch_size",))] = 20
    "Samples per forward on each device; a step's batch is this times their number."
    gradient_accumulation: Annotated[Count, RUN, Option(names=("gradient_accumulation_steps",))] = 1
    "Forwards per step, weighted by their samples: a step equals one on all of them together. The last of --epochs may have fewer."
    learning_rate: Annotated[Number, OPTIMISER, Option(names=("lr",))] = 1e-3
    "Peak learning rate of adapters."
    base_learning_rate: Annotated[Number | None, OPTIMISER, Option(names=("base_lr",))] = None
    "Peak learning rate of trained base weights: T, LayerNorm, ... (default: a tenth of the adapters')."
    min_learning_rate: Annotated[Number, OPTIMISER, Option(names=("min_lr",))] = 0.0
    "Learning rate at which the cosine ends."
    warmup: Annotated[Number, OPTIMISER, Option(names=("warmup_ratio", "warmup_steps"))] = 0.05
    "Linear rise from 0: steps, or a fraction of all steps if below 1."
    weight_decay: Annotated[Number, OPTIMISER] = 0.05
    "Weight decay, of matrices only: not of biases, norms and IA3 vectors."
    beta1: Annotated[Fraction, OPTIMISER, Option(names=("adam_beta1",))] = 0.9
    "Decay of AdamW's mean."
    beta2: Annotated[Fraction, OPTIMISER, Option(names=("adam_beta2",))] = 0.999
    "Decay of AdamW's variance."
    max_grad_norm: Annotated[Number, OPTIMISER] = 1.0
    "Clip gradients to this norm; 0: not at all."
    dtype: Annotated[Dtype, MEMORY] = "fp32"
    "Dtype of the base; adapters, optimiser state and master copies of trained base weights stay float32."
    seed: Annotated[CountOrZero, RUN] = 0
    "Seed of adapters, dropout and the order of samples."
    questions_per_image: Annotated[Count, RUN] = 1
    "Group a batch's questions by image (see EpochSampler), so that the image is computed once for them."
    share_prefix: Annotated[bool, MEMORY, Option(off="no_share_prefix")] = True
    "Compute what a causal model's samples of a batch begin with (system text, image) once for all of them; dropout falls on it once."
    feature_cache: Annotated[bool, MEMORY, Option(off="no_feature_cache")] = True
    "Keep a frozen image encoder's features instead of computing them at every visit, where they are constants."
    feature_cache_dir: Annotated[FilePath | None, MEMORY, Option(must="text")] = None
    "Folder for these features, found by content by later runs and other processes."
    feature_cache_memory: Annotated[Size | None, MEMORY] = None
    "Memory that these features may take, such as 2GB (default: a third of what is free)."
    feature_dtype: Annotated[Dtype | None, MEMORY] = None
    "Keep these features as fp32 or bf16 (default: as computed)."
    cuda_graph: Annotated[bool, RUN, Option(off="no_cuda_graph")] = True
    "Launch whole steps as CUDA graphs, on padded batches; a step that cannot be captured, or is too large to gain, runs as it is."
    cache_layers: Annotated[Text | None, MEMORY, Option(must="a size or a folder")] = None
    "Keep what a language model's lower layers compute where they train nothing: a size of memory, such as 4GB, or a folder."
    memory_budget: Annotated[Size | None, MEMORY] = None
    "Compute activations again in backward to keep weights, gradients, optimiser state and activations below this size, such as 6GB."
    shard: Annotated[Literal["base"] | None, MEMORY] = None
    "With base, each of several ranks (torchrun) holds its part of the frozen weights, and gathers a layer's when it runs (FSDP2)."
    without: Annotated[Text | None, MEMORY] = None
    "Savings to switch off: remake, labelled, absorb (see fastpeft.without)."
    num_workers: Annotated[CountOrZero, RUN, Option(names=("workers", "dataloader_num_workers"))] = 0
    "Processes that decode images."
    worker_timeout: Annotated[Count, RUN] = 1800
    "Seconds after which a data worker that gives no batch counts as stuck: the run saves and ends."
    on_nan: Annotated[Literal["stop", "skip"], RUN] = "stop"
    "Where a step's loss or gradients are not finite: stop, or skip its update, up to 10 in a row; the batch and the module are named."
    async_save: Annotated[bool, OUTPUT] = False
    "Copy what a checkpoint holds, and write it in a thread while training goes on."
    save_every: Annotated[CountOrZero, OUTPUT, Option(names=("save_steps",))] = 200
    "Steps between checkpoints; 0: at the end only."
    keep_checkpoints: Annotated[Count, OUTPUT, Option(names=("save_total_limit",))] = 2
    "Checkpoints that stay: where the newest turns out to be damaged, the one before resumes."
    eval_every: Annotated[CountOrZero, VALIDATE, Option(names=("eval_steps",))] = 0
    "Steps between validations on the data set's validation split, else on the part that hold_out holds out; 0: none."
    patience: Annotated[CountOrZero, VALIDATE, Option(names=("early_stopping_patience",))] = 0
    "End the run after this many validations in a row without a better one; 0: never."
    best_by: Annotated[Literal["loss", "open", "closed", "global"], VALIDATE] = "loss"
    "Which validation is the best, whose adapter the run ends with: that of the lowest loss, or of the highest accuracy."
    eval_scores: Annotated[bool, VALIDATE, Option(off="eval_loss_only")] = True
    "Answer and score the validation questions at each validation, beside their loss."
    out: Annotated[FilePath | None, OUTPUT, Option(names=("output_dir",), must="text")] = None
    "Folder for the run's files; without it none are written."
    resume: Annotated[bool, OUTPUT, Option(names=("resume_from_checkpoint",))] = False
    "Go on from the newest intact checkpoint in --out; without one, start afresh and say so."
    allow_change: Annotated[tuple[str, ...] | None, OUTPUT, Option(must="names, such as learning_rate,weight_decay")] = None
    "What a resumed run may have otherwise than its checkpoint, such as learning_rate,weight_decay; the summary says so."
    device: Annotated[Text | None, RUN] = None
    "Where to compute: cpu, cuda, ... (default: CUDA where there is one)."
    tensorboard: Annotated[bool, OUTPUT] = False
    "Write event files for TensorBoard."
    track: Annotated[tuple[str, ...] | None, OUTPUT, Option(names=("report_to",), must="names, such as tensorboard,wandb")] = None
    "Programs that follow the run: tensorboard, wandb, mlflow; each by its own environment variables."
    trace: Annotated[bool, OUTPUT] = False
    "Write torch.profiler's trace of three steps."
    progress: Annotated[bool, OUTPUT, Option(off="quiet")] = True
    "Show progress bars."

    def __post_init__(self):
        if self.learning_rate == 0:
            raise ValueError("epochs and learning_rate must be above 0")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        if unknown := sorted(set(self.savings_off) - SAVINGS.keys()):
            raise ValueError(f"no saving is called {', '.join(unknown)}; there are {', '.join(SAVINGS)}")
        if self.eval_every == 0 and (self.patience or self.best_by != "loss" or not self.eval_scores):
            raise ValueError("patience, best_by and eval_loss_only are about validations: give eval_every, the steps between them")
        if self.best_by != "loss" and not self.eval_scores:
            raise ValueError(f"best_by={self.best_by} needs answers: leave eval_loss_only out")
        if unknown := sorted(set(self.trackers) - set(TRACKERS)):
            raise ValueError(f"no tracker is called {', '.join(unknown)}; there are {', '.join(TRACKERS)}")
        if self.out is None and (self.resume or self.trackers or self.trace):
            raise ValueError("resume, tensorboard, track and trace need a folder: give out")

    @property
    def trackers(self) -> tuple[str, ...]:
        """Programs that follow the run."""
        return tuple(dict.fromkeys((*(self.track or ()), *(("tensorboard",) if self.tensorboard else ()))))

    @property
    def savings_off(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.without or "").split(",") if name.strip())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """ValueError names unknown options."""
        return split(values, cls)[0]
