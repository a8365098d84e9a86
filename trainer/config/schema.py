"""The sections of the configuration, typed. What each key means stands under it; the editor shows it too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from trainer.config.deepspeed import DeepSpeedSection
from trainer.config.section import Section

DEFAULT_CACHE = "~/.cache/tessera"
AUTOMATIC_CHECKPOINTS = 10
"""Checkpoints of a run whose `checkpoint.every_steps` is "auto"."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
Text = Annotated[str, Field(min_length=1)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$", max_length=256)]


class RunSection(Section):
    output_dir: Text
    """The run directory: everything this run writes lies below it. Must be shared by all hosts."""

    name: Name | None = None
    """What trackers call the run. Default: the name of the run directory."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seeds the weights, the order of the data and dropout."""

    plugins: list[ModuleName] = []
    """Python modules that every process imports before it looks at the model, such as a package of yours that calls
    `AutoConfig.register` and `AutoModelForCausalLM.register`. **Their code runs.** They must be installed in this
    environment (or lie on PYTHONPATH) on every host; nothing is downloaded."""

    collective_timeout_seconds: Annotated[float, Field(ge=1, le=604_800)] = 1800.0
    """How long a rank waits for the others in any collective of a step, an evaluation or a save before the run is ended
    with exit status 6, naming the ranks that are missing. The first step and the first evaluation have at least 600 s,
    and ranks wait for each other up to a day before training starts. Must be longer than the slowest rank takes to
    write and upload its files of a checkpoint."""


class ModelSection(Section):
    path: Text | None = None
    """A folder with a Hugging Face model, or the name of one on the hub, or a checkpoint, whose weights are then taken
    without the optimizer's state."""

    config: dict[str, Any] | None = None
    """Instead of `path`: the model's configuration itself, `{"model_type": "llama", "hidden_size": 256, ...}`."""

    initialize: Literal["pretrained", "random"] | None = None
    """Where the weights come from. Default: `pretrained` with `path`, `random` with `config`. With `random`, nothing of
    a folder but its configuration is used, so its weights may be quantized or missing."""

    allow_unexpected_keys: bool = False
    """Leave out tensors in the folder at `path` that no class of the family has, with a line in the log, instead of
    refusing them. Keys of quantized weights are always refused."""

    task: Literal["causal_lm"] = "causal_lm"
    """What the model learns: `causal_lm` predicts the next token. A model that sees later tokens is refused before the
    first step; with `config`, `is_decoder` of BERT and its kin (`causal` of XLM) is true unless it is set."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """The attention implementation of transformers. Default: `sdpa`, or `eager` for the families that have no sdpa."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full` keeps only each layer's input and computes the layer again in the backward pass; `selective` does so with
    attention alone."""


class ParallelSection(Section):
    tensor: Annotated[int, Field(ge=1)] = 1
    """Ranks that share every weight matrix between them."""

    pipeline: Annotated[int, Field(ge=1)] = 1
    """Ranks that the layers are divided over, in stages; micro-batches pass through them one after the other."""

    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """`1f1b`: each rank has one stage, and does one forward and one backward pass in turn. `dualpipev`: each has two,
    one on the way out and one on the way back, and waits less; it takes at least 2 x `pipeline` micro-batches, all of
    one shape, and keeps all their activations."""

    pipeline_layers: list[Annotated[int, Field(ge=1)]] | None = None
    """How many layers each stage has (2 x `pipeline` numbers under `dualpipev`). Default: divided so that the slowest
    stage is as fast as it can be."""

    pipeline_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How fast each rank of the pipeline is, relative to the others: `[1, 1, 0.5]` gives the third half of the work."""

    @property
    def stages(self) -> int:
        """Stages that the layers are divided into."""
        return self.pipeline * (2 if self.pipeline_schedule == "dualpipev" else 1)

    def bubble(self, micro_batches: int) -> float:
        """Share of a step in which a rank of the pipeline waits, for equal stages.

        Under 1F1B (ranks - 1) / (micro-batches + ranks - 1): Narayanan et al. 2021, "Efficient Large-Scale Language
        Model Training on GPU Clusters", section 2.2. Under DualPipeV, as DeepSpeed 0.19 schedules it (a backward pass
        as a whole, of twice the time of a forward pass), each rank but the last adds the time of one forward and two
        backward passes of one of its two stages. `python -m tools.bench pipeline` measures both.
        """
        if self.pipeline_schedule == "dualpipev":
            forward, backward = 1, 2
            waits = (self.pipeline - 1) * (forward + 2 * backward)
            return waits / (2 * micro_batches * (forward + backward) + waits)
        return (self.pipeline - 1) / (micro_batches + self.pipeline - 1)

    sequence_parallel: bool = False
    """Between the cut parts of a layer each tensor rank holds its stretch of every sequence: activations outside
    attention and MLP take 1/tensor of the memory, for the same traffic."""

    tensor_plan: dict[str, str] = {}
    """How weights are cut, by name (with `*` for numbers), in Hugging Face's words: `{"layers.*.mlp.up_proj":
    "colwise"}`. Overrides the rows that the family has."""


class SourceSection(Section):
    path: Text
    """A file, a glob or a folder (.jsonl, .json, .txt, also compressed as .gz, .zst, .bz2 or .xz; .parquet, .csv,
    .arrow, .bin with .idx, or one saved by `datasets`), `hf://OWNER/NAME`, or `builtin:python-stdlib`."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How many times an epoch reads this source: 2.0 twice, 0.5 a different half each epoch."""


class ValidationSourceSection(Section):
    path: Text | None = None
    """As in `data.train`. Either this or `fraction` is required."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the training documents: those whose content's hash is small enough, so that the choice
    depends on nothing else, and duplicates are on the same side. They are not trained on. One source may be such."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """An evaluation reads everything once: 1.0."""

    @model_serializer(mode="wrap")
    def _omit_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class DataSection(Section):
    train: Annotated[list[SourceSection], Field(min_length=1)]
    """What is trained on."""

    sequence_length: Annotated[int, Field(ge=1)]
    """Tokens that the model reads at once. A sample has one id more: inputs and labels are shifted by one."""

    validation: list[ValidationSourceSection] = []
    """What is evaluated on; never trained on. `[{"fraction": 0.01}]` holds out one in a hundred training documents."""

    @property
    def held_out_fraction(self) -> float | None:
        """Share of the training documents that is held out for validation; None if none is."""
        return next((source.fraction for source in self.validation if source.fraction is not None), None)

    @property
    def paths(self) -> list[str]:
        """Of all sources that have one, those of training first."""
        held_out = [source.path for source in self.validation if source.path is not None]
        return [*(source.path for source in self.train), *held_out]

    packing: Literal["concatenate", "none"] = "concatenate"
    """`concatenate` joins documents into one stream and cuts it into samples, the last one of a source padded; `none`
    makes each document one sample, cut at `sequence_length` and padded within its micro-batch."""

    drop_last: bool = False
    """Leave out the last, shorter sample of each source under `concatenate`, training and validation."""

    text_field: Text = "text"
    """The field that holds the text in .jsonl, .parquet, .csv, .arrow and hub datasets."""

    tokenizer: Text | None = None
    """A folder or hub name with a tokenizer. Default: the model's; with an inline model, one is trained
    (byte-level BPE of the model's vocabulary size) on the training text."""

    special_tokens: Literal["tokenizer", "end", "none"] = "tokenizer"
    """Special tokens around each document. `tokenizer`: what the tokenizer adds to a single text (such as a
    beginning-of-text token), and the end-of-text token after it unless it is there already; `end`: the end-of-text
    token alone; `none`. A document cut into samples has them once. `--dry_run` and the run's `config.json` show the
    ids."""

    cache_dir: Text | None = None
    """Where tokenised text is kept. Default: `~/.cache/tessera`. May lie on each host's own disk."""

    max_document_bytes: Annotated[int, Field(ge=1, le=2_000_000_000)] = 64_000_000
    """Bytes of the longest document of .jsonl, .json and tables (a line, an element, a row's text), each of which is
    in memory as a whole. A longer one is refused with its file and line. .txt files may have any length."""


class TrainingSection(Section):
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps in all. Required, unless `epochs` is given."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Instead of `max_steps`: passes over the training data, such as 3 or 0.5; sources count with their weights. The
    number of steps is derived once the data are prepared: epochs x samples of an epoch / `train_batch_size`, rounded
    up. `--dry_run`, the log and `config.json` (`tessera.steps`) show it."""

    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds from the trainer's start, on rank 0's clock, after which all ranks complete the steps in progress, save,
    and exit with status 75; the same command resumes. Leave time for two steps and a save before whatever ends the job.
    Default: no limit."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two logged ones. Step 1 and the last are always logged."""

    verify_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between two comparisons, by hash, of the weights that several ranks hold: data ranks under ZeRO 0 to 2,
    tensor ranks what is replicated, stages what is tied. A difference ends the run with status 5 and the names of rank
    and weight. 0: never."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the vocabulary. `loss` is reported without it."""

    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting; PaLM took
    1e-4. `loss` is reported without it."""

    loss_chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """So many tokens' logits are in fp32 at once in the loss; less memory, the same numbers. Default: all."""

    weight_decay_exclude: Literal["biases_and_norms"] | list[Text] = "biases_and_norms"
    """Weights without weight decay: patterns of full Hugging Face names, in which `*` stands for any text, such as
    `["*.bias", "model.embed_tokens.weight"]`; `[]` excludes none. `biases_and_norms` excludes weights of at most one
    dimension, weights whose name ends in `bias`, and weights of modules whose class name contains `Norm`."""

    learning_rate_scales: dict[Text, Annotated[float, Field(ge=0)]] = {}
    """Factors on the learning rate of the weights that a pattern matches, as in `{"model.embed_tokens.*": 0.1}`. A
    factor applies to whichever rate the schedule and the optimizer give the weight (`lr`, `muon_lr`, `adam_lr`); the
    logged rate is the unscaled one."""


class EvaluationSection(Section):
    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations. Default: only at step 0 and at the end."""

    max_batches: Annotated[int, Field(ge=1)] | None = None
    """Evaluate on so many global batches (of `train_batch_size` samples): the first samples of each source, in
    proportion to what it has, but at least one batch of each, also where these are more than `max_batches` together.
    Default: on all."""


class CheckpointSection(Section):
    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Steps between two checkpoints; there is always one at the end. `auto` is a tenth of the run's steps, rounded up;
    null saves at the end only."""

    keep_last: Annotated[int, Field(ge=1)] | None = 2
    """Keep the newest so many; older ones are deleted, once a newer one has been verified. null keeps all."""

    keep_best: Annotated[int, Field(ge=0)] = 1
    """Beside these keep so many of the lowest held-out loss, among those whose step was evaluated."""

    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Beside these keep those whose step is a multiple of this."""

    asynchronous: bool = False
    """Whether training goes on while a copy of the state in host memory is written."""

    resume: Text = "auto"
    """`auto` goes on from the newest checkpoint of the run directory, or begins if there is none; `never` begins;
    anything else names a checkpoint, a run directory, or a place as `upload` does, to go on from."""

    allow_changed: list[Text] = []
    """Keys that may differ from those of the run that is gone on with, and what lies below them; without it another
    model, other data, another batch size, seed or optimizer are refused. `--allow_change KEY` adds one."""

    def interval(self, steps: int) -> int | None:
        """Steps between two checkpoints of a run of so many steps; None for one at the end only."""
        return -(-steps // AUTOMATIC_CHECKPOINTS) if self.every_steps == "auto" else self.every_steps

    upload: Text | None = None
    """Where each checkpoint is copied once it is complete, as fsspec names places: `s3://bucket/run`. Where the run
    directory has no checkpoint, `resume: auto` looks here."""


class WandbSection(Section):
    mode: Literal["online", "offline", "disabled"] = "disabled"
    """`offline` writes below the run directory without a network; `wandb sync` uploads it later."""

    project: Text = "tessera"
    entity: Text | None = None
    group: Text | None = None
    tags: list[Text] = []


class TrackingSection(Section):
    wandb: WandbSection = WandbSection()


class Config(BaseModel):
    """A whole configuration. Built by `load_config`, which also checks what no single section can see."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Tessera configuration")

    run: RunSection
    model: ModelSection
    data: DataSection
    training: TrainingSection
    deepspeed: DeepSpeedSection
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    tracking: TrackingSection = TrackingSection()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation  # type: ignore[misc]
    for name, field in Config.model_fields.items()
}
