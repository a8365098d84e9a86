"""The sections of the configuration. The docstring under a key is its documentation in docs/ and in editors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)
from pydantic_core import PydanticCustomError

from trainer.config.deepspeed import DeepSpeedSection
from trainer.config.section import Section
from trainer.config.tasks import DEFAULT_TASK, TASK_FAMILIES

DEFAULT_CACHE = "~/.cache/tessera"
AUTOMATIC_CHECKPOINTS = 10
"""Checkpoints of a run whose `checkpoint.every_steps` is "auto"."""


def _known_task(name: str) -> str:
    if name not in TASK_FAMILIES:
        message = f"Input should be {' or '.join(map(repr, TASK_FAMILIES))}"
        raise PydanticCustomError("literal_error", message)
    return name


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=128)]
Text = Annotated[str, Field(min_length=1)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$", max_length=256)]
TaskName = Annotated[str, AfterValidator(_known_task), WithJsonSchema({"enum": list(TASK_FAMILIES), "type": "string"})]


class RunSection(Section):
    """The run itself: its directory, its seed, and user code that it needs."""

    output_dir: Text
    """The run directory: the run writes nothing outside it. All hosts must share it."""

    name: Name | None = None
    """Name of the run for trackers. Default: the name of the run directory."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1234
    """Seed of random weights, the order of the data, and dropout."""

    plugins: list[ModuleName] = []
    """Python modules that every process imports before it reads the model's configuration, such as a package of yours
    that calls `AutoConfig.register` and `AutoModelForCausalLM.register`. **Their code runs.** They must be installed in
    the environment (or lie on PYTHONPATH) of every host; nothing is downloaded."""

    collective_timeout_seconds: Annotated[float, Field(ge=1, le=604_800)] = 1800.0
    """Seconds that a rank waits for the others in a collective of a step, an evaluation or a save before the run ends
    with exit status 6, naming the missing ranks. The first step and the first evaluation have at least 600 s, and ranks
    wait for each other up to a day before training starts. Must be longer than the slowest rank takes to write and
    upload its files of a checkpoint."""


class ModelSection(Section):
    """The model: its architecture, where its weights come from, and how it computes."""

    path: Text | None = None
    """A folder with a Hugging Face model, the name of one on the hub, or a checkpoint, of which only the weights are
    used. Either this or `config` is required."""

    config: dict[str, Any] | None = None
    """The model's configuration inline, such as `{"model_type": "llama", "hidden_size": 256, ...}`."""

    initialize: Literal["pretrained", "random"] | None = None
    """Source of the weights. Default: `pretrained` with `path`, `random` with `config`. With `random` only the
    configuration of a folder is used, so that its weights may be quantized or missing."""

    allow_unexpected_keys: bool = False
    """Ignore unexpected keys in the weights at `path`, with a line in the log, instead of refusing them. Keys of
    quantized weights are always refused."""

    task: TaskName = DEFAULT_TASK
    """What the model learns: `causal_lm` predicts the next token. A model whose attention sees later tokens is refused
    before the first step; with `config`, `is_decoder` of BERT and relatives (`causal` of XLM) is true unless set."""

    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = None
    """Attention implementation of transformers. Default: `sdpa`, or `eager` for families without it."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations that are recomputed in the backward pass instead of being stored: with `full` each layer from its
    input, with `selective` only the attention."""


class ParallelSection(Section):
    """How the model is divided over processes. Data parallelism uses the processes that remain."""

    tensor: Annotated[int, Field(ge=1)] = 1
    """Tensor-parallel size: ranks over which each weight matrix is sharded."""

    pipeline: Annotated[int, Field(ge=1)] = 1
    """Pipeline-parallel size: ranks over which the layers are divided, in stages."""

    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """`1f1b`: each rank has one stage and alternates between a forward and a backward pass. `dualpipev`: each rank has
    two stages in a V shape, which shrinks the bubble. It requires at least 2 x `pipeline` micro-batches, all of one
    shape, and keeps the activations of all of them."""

    pipeline_layers: list[Annotated[int, Field(ge=1)]] | None = None
    """Number of layers of each stage (2 x `pipeline` numbers with `dualpipev`). Default: the partition that minimizes
    the time of the slowest stage."""

    pipeline_weights: list[Annotated[float, Field(gt=0)]] | None = None
    """Relative speed of each pipeline rank: `[1, 1, 0.5]` gives the third half of the work."""

    sequence_parallel: bool = False
    """Shard activations outside attention and MLP along the sequence over the tensor ranks: they take 1/`tensor` of the
    memory, for the same traffic."""

    tensor_plan: dict[str, str] = {}
    """Tensor-parallel styles of weights, by name (`*` for numbers), in Hugging Face's words:
    `{"layers.*.mlp.up_proj": "colwise"}`. Overrides entries of the family's plan."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor * self.pipeline

    @property
    def stages(self) -> int:
        """Stages that the layers are divided into."""
        return self.pipeline * (2 if self.pipeline_schedule == "dualpipev" else 1)

    def bubble(self, micro_batches: int) -> float:
        """Return the share of a step in which a pipeline rank is idle, for equal stages.

        Under 1F1B (ranks - 1) / (micro-batches + ranks - 1): Narayanan et al. 2021, "Efficient Large-Scale Language
        Model Training on GPU Clusters", section 2.2. Under DualPipeV, as DeepSpeed 0.19 schedules it (an undivided
        backward pass that takes twice the time of a forward pass), each rank but the last adds the time of one forward
        and two backward passes of one of its two stages. `python -m tools.bench pipeline` measures both.
        """
        if self.pipeline_schedule == "dualpipev":
            forward, backward = 1, 2
            idle = (self.pipeline - 1) * (forward + 2 * backward)
            return idle / (2 * micro_batches * (forward + backward) + idle)
        return (self.pipeline - 1) / (micro_batches + self.pipeline - 1)


class SourceSection(Section):
    """A source of training data."""

    path: Text
    """A file, a glob or a folder (.jsonl, .json, .txt, also compressed as .gz, .zst, .bz2 or .xz; .parquet, .csv,
    .arrow, .bin with .idx, or one saved by `datasets`), `hf://OWNER/NAME`, or `builtin:python-stdlib`."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Passes over this source in an epoch: 2.0 reads it twice, 0.5 a different half in each epoch."""


class ValidationSourceSection(Section):
    """A source of validation data."""

    path: Text | None = None
    """As in `data.train`. Either this or `fraction` is required."""

    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold out this share of the training documents: those whose content has a small enough hash, so that the choice
    depends on nothing else, and duplicates are in the same split. They are not trained on. At most one source may set
    it."""

    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Must be 1.0, because an evaluation reads every sample once."""

    @model_serializer(mode="wrap")
    def _omit_unset(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if value is not None}


class DataSection(Section):
    """The data, and how it becomes samples of tokens."""

    train: Annotated[list[SourceSection], Field(min_length=1)]
    """Sources of the training data."""

    sequence_length: Annotated[int, Field(ge=1)]
    """Tokens of a sequence. A sample has one id more: labels are the inputs shifted by one."""

    validation: list[ValidationSourceSection] = []
    """Sources that are evaluated on and not trained on. `[{"fraction": 0.01}]` holds out one in a hundred training
    documents."""

    packing: Literal["concatenate", "none"] = "concatenate"
    """`concatenate` joins documents into one stream and cuts it into samples, the last one of a source padded; with
    `none` each document is a sample, truncated at `sequence_length` and padded within its micro-batch."""

    drop_last: bool = False
    """Drop the last, shorter sample of each source with `concatenate`, in training and validation."""

    text_field: Text = "text"
    """Field with the text in .jsonl, .parquet, .csv, .arrow and hub datasets."""

    tokenizer: Text | None = None
    """Folder or hub name of a tokenizer. Default: the model's; with an inline model a byte-level BPE of the model's
    vocabulary size is trained on the training text."""

    special_tokens: Literal["tokenizer", "end", "none"] = "tokenizer"
    """Special tokens around each document. `tokenizer`: those that the tokenizer adds to a single text (such as a
    beginning-of-text token), and the end-of-text token after it if it is not among them; `end`: the end-of-text token
    alone; `none`. A document that is cut into samples has them once. `--dry_run` and the run's `config.json` show the
    ids."""

    cache_dir: Text | None = None
    """Folder of tokenized text. Default: `~/.cache/tessera`. May lie on the local disk of each host."""

    max_document_bytes: Annotated[int, Field(ge=1, le=2_000_000_000)] = 64_000_000
    """Maximum size in bytes of a document of .jsonl, .json and tables (a line, an element, the text of a row), which is
    read into memory at once. A larger one is refused with its file and line. .txt files may have any size."""

    @property
    def held_out_fraction(self) -> float | None:
        """Share of the training documents that is held out for validation; None if none is."""
        return next((source.fraction for source in self.validation if source.fraction is not None), None)

    @property
    def paths(self) -> list[str]:
        """Paths of all sources that have one, those of training first."""
        held_out = [source.path for source in self.validation if source.path is not None]
        return [*(source.path for source in self.train), *held_out]


class TrainingSection(Section):
    """The length of the training, the loss, and settings by weight."""

    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps of the run. Either this or `epochs` is required."""

    epochs: Annotated[float, Field(gt=0, le=1_000_000)] | None = None
    """Passes over the training data, such as 3 or 0.5, in which sources count with their weights. The number of steps
    is known once the data are prepared: epochs x samples of an epoch / `train_batch_size`, rounded up. `--dry_run`, the
    log and `config.json` (`tessera.steps`) show it."""

    max_seconds: Annotated[float, Field(gt=0)] | None = None
    """Seconds from the trainer's start, on the clock of rank 0, after which all ranks complete the steps in progress,
    save, and exit with status 75; the same command resumes. Leave time for two steps and a save before the job's limit.
    Default: no limit."""

    log_every_steps: Annotated[int, Field(ge=1)] = 10
    """Steps between two logged steps. Step 1 and the last step are always logged."""

    verify_every_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between two comparisons, by hash, of replicated weights: over data ranks under ZeRO 0 to 2, over tensor
    ranks for replicated weights, over stages for tied weights. A difference ends the run with status 5 and the names of
    rank and weight. 0: never."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target distribution that is spread evenly over the vocabulary. `loss` is reported without it."""

    z_loss: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared logarithm of the softmax's denominator, which keeps logits from drifting; PaLM used 1e-4.
    `loss` is reported without it."""

    loss_chunk_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens whose logits are in fp32 at once in the loss; fewer take less memory, for the same result. Default:
    all."""

    weight_decay_exclude: Literal["biases_and_norms"] | list[Text] = "biases_and_norms"
    """Weights without weight decay: patterns of full Hugging Face names, in which `*` matches any text, such as
    `["*.bias", "model.embed_tokens.weight"]`; `[]` excludes none. `biases_and_norms` excludes weights of at most one
    dimension, weights whose name ends in `bias`, and weights of modules whose class name contains `Norm`."""

    learning_rate_scales: dict[Text, Annotated[float, Field(ge=0)]] = {}
    """Factors on the learning rate of the weights that a pattern matches, such as `{"model.embed_tokens.*": 0.1}`. A
    factor applies to whichever rate the schedule and the optimizer set (`lr`, `muon_lr`, `adam_lr`); the logged rate is
    without it."""


class EvaluationSection(Section):
    """Evaluation on the validation data."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between two evaluations. Default: only at step 0 and at the end."""

    max_batches: Annotated[int, Field(ge=1)] | None = None
    """Global batches (of `train_batch_size` samples) of an evaluation: the first samples of each source, in proportion
    to its size, with at least one batch of each, even if these exceed `max_batches` together. Default: all."""


class CheckpointSection(Section):
    """When checkpoints are saved, which are kept, and what a run resumes from."""

    every_steps: Annotated[int, Field(ge=1)] | Literal["auto"] | None = "auto"
    """Steps between two checkpoints; the last step always has one. `auto` is a tenth of the run's steps, rounded up;
    null saves at the end only."""

    keep_last: Annotated[int, Field(ge=1)] | None = 2
    """Number of newest checkpoints to keep; an older one is deleted once a newer one is verified. null keeps all."""

    keep_best: Annotated[int, Field(ge=0)] = 1
    """Number of further checkpoints to keep: those with the lowest validation loss, among evaluated steps."""

    keep_every_steps: Annotated[int, Field(ge=1)] | None = None
    """Keep also checkpoints whose step is a multiple of this."""

    asynchronous: bool = False
    """Write a copy of the state in host memory while training continues."""

    resume: Text = "auto"
    """`auto` resumes from the newest checkpoint of the run directory, or starts a new run if there is none; `never`
    starts a new run; anything else names a checkpoint, a run directory, or a location as in `upload` to resume from."""

    allow_changed: list[Text] = []
    """Keys, with all below them, that may differ from those of the resumed run. Without it another model, other data,
    another batch size, seed or optimizer are refused. `--allow_change KEY` adds one."""

    upload: Text | None = None
    """Location that each complete checkpoint is copied to, in the syntax of fsspec: `s3://bucket/run`. `resume: auto`
    also looks there if the run directory has no checkpoint."""

    def interval(self, steps: int) -> int | None:
        """Return the steps between two checkpoints of a run of so many steps; None for one at the end only."""
        return -(-steps // AUTOMATIC_CHECKPOINTS) if self.every_steps == "auto" else self.every_steps


class WandbSection(Section):
    """Tracking with Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] = "disabled"
    """`offline` writes below the run directory without a network; `wandb sync` uploads it later."""

    project: Text = "tessera"
    """Project of the run."""

    entity: Text | None = None
    """User or team that owns the project. Default: that of the API key."""

    group: Text | None = None
    """Group of runs that this run belongs to."""

    tags: list[Text] = []
    """Tags of the run."""


class TrackingSection(Section):
    """Trackers that receive the metrics, in addition to the console and metrics.jsonl."""

    wandb: WandbSection = WandbSection()
    """Weights & Biases."""


class Config(BaseModel):
    """A whole configuration. `load_config` builds it, and checks the relations between its sections."""

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
