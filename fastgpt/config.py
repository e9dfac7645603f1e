"""Typed configuration: the network, the training run, and named presets of both."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from fastgpt.errors import InputError

Activation = Literal["gelu_tanh", "gelu_erf", "relu", "relu2", "swiglu"]
Position = Literal["learned", "rope"]
Norm = Literal["layer_norm", "rms_norm"]
CONFIG = "config.json"  # in the folder of a run: its settings
VOCAB_MULTIPLE = 128  # the embedding is padded to this, so that the classifier's matmul has full tiles
SWIGLU_MULTIPLE = 64  # the same for the width inside an MLP that no round number of n_embd gives


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network. The defaults are GPT-2 (124M); docs/modern.md is about the rest."""

    vocab_size: int = 50257
    """Tokens in the vocabulary. Training takes it from the tokenizer."""
    block_size: int = 1024
    """The longest context, in tokens."""
    n_layer: int = 12
    """Transformer blocks."""
    n_head: int = 12
    """Attention heads; n_embd must be a multiple of it."""
    n_embd: int = 768
    """Width of the residual stream."""
    dropout: float = 0.0
    """Probability of dropping an activation while training."""
    bias: bool = True
    """Whether linear layers and LayerNorms have a bias, as in GPT-2."""
    activation: Activation = "gelu_tanh"
    """GPT-2 has gelu_tanh, nanoGPT gelu_erf, the first lecture relu. relu2 is relu squared; swiglu has
    a gate, a third matrix, and is two thirds as wide, so that an MLP's parameters stay as many."""
    tied_head: bool = True
    """Whether the classifier's weights are the token embedding's, as in GPT-2; else it has its own."""
    position: Position = "learned"
    """learned: an embedding of positions, as in GPT-2. rope: queries and keys turned by their positions."""
    norm: Norm = "layer_norm"
    """GPT-2 has layer_norm. rms_norm has no mean to subtract and no bias."""
    qk_norm: bool = False
    """Whether each head's queries and keys go through an RMSNorm, which bounds attention scores."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(
            self.n_embd % self.n_head == 0, "n_embd", self.n_embd, f"a multiple of n_head = {self.n_head}"
        )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and less than 1")
        for name, allowed in {"activation": Activation, "position": Position, "norm": Norm}.items():
            _require(getattr(self, name) in get_args(allowed), name, getattr(self, name), get_args(allowed))
        if self.position == "rope":
            _require(self.head_size % 2 == 0, "n_embd / n_head", self.head_size, "even with rope")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up; the extra ones are masked from loss and sampling."""
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_size(self) -> int:
        """The width inside an MLP: 4C, and of the three matrices of swiglu 8C/3, rounded up."""
        if self.activation == "swiglu":
            return math.ceil(8 * self.n_embd / 3 / SWIGLU_MULTIPLE) * SWIGLU_MULTIPLE
        return 4 * self.n_embd


TokenizerName = Literal["char", "byte", "gpt2"]
Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
Weights = Literal["auto", "fp32", "bf16"]
Recompute = Literal["none", "gelu", "block"]
Parallel = Literal["ddp", "zero1", "fsdp", "hsdp"]
GuardAction = Literal["off", "warn", "skip", "stop"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    model: GPTConfig = field(default_factory=GPTConfig)

    corpus: str = "shakespeare"
    """`shakespeare`, `pydocs`, a text file, a folder of text files, or a folder of token shards; or problems,
    which are made as they are needed: `addition`, `calculator`."""
    fallback_corpus: str | None = None
    """Used instead, with a notice, when the corpus cannot be downloaded."""
    tokenizer: TokenizerName = "gpt2"
    """How text becomes tokens. Token shards and problems bring their own."""
    val_fraction: float = 0.1
    """The share at the end of the text that is kept for validation."""

    out_dir: Path | None = None
    """The run's folder; by default runs/PRESET-TIME."""
    resume: bool = False
    """Continue the run in out_dir from its last checkpoint."""
    init_from: str | None = None
    """Start from these weights: a run, a checkpoint, another project's, or gpt2, gpt2-medium, ..."""

    max_steps: int = 2000
    """Optimizer steps in all."""
    batch_size: int = 12
    """Sequences per optimizer step, over all micro-batches."""
    micro_batch_size: int | None = None
    """Sequences per forward pass; gradients are accumulated up to batch_size. By default batch_size."""

    optimizer: Optimizer = "adamw"
    """adamw, or muon: Muon for the matrices of the blocks and AdamW for everything else."""
    learning_rate: float = 6e-4
    """The peak, of AdamW."""
    muon_learning_rate: float | None = None
    """The peak of Muon, in the units of AdamW's (docs/modern.md). By default learning_rate."""
    schedule: Schedule = "cosine"
    """After the warmup: cosine or linear decay to the floor, constant, or constant and then a linear
    decay over the last decay_fraction of the steps (wsd: warmup, stable, decay)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises from zero."""
    min_lr_fraction: float = 0.1
    """The floor of the decay, as a fraction of learning_rate."""
    decay_fraction: float = 0.2
    """For wsd: the share of the steps that decays."""
    weight_decay: float = 0.1
    """Applied to matrices and embeddings; never to biases and norms."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averages of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    device: str = "auto"
    """auto (cuda, else mps, else cpu), or a device by name."""
    precision: Precision = "auto"
    """fp32, tf32 (fp32 with TensorFloat-32 matmuls), bf16 or fp16 (autocast; fp16 with a gradient scaler).
    auto is bf16 on GPUs that have it and on CPUs that multiply it, and fp32 elsewhere."""
    weights: Weights = "auto"
    """What the network holds: fp32, cast by autocast in each step, or bf16, with the optimizer updating fp32
    master weights that checkpoints keep. auto is bf16 on a CPU that computes in bf16, and fp32 elsewhere."""
    recompute: Recompute = "none"
    """What backward computes again instead of keeping it: nothing, the outputs of GELU, or whole blocks."""
    compile: bool = False
    """Run the network through torch.compile."""
    seed: int = 1337
    """Seeds initial weights, dropout and the order of the data."""
    parallel: Parallel = "ddp"
    """Under torchrun, what each process holds: all (ddp), all but the optimizer's state (zero1), its share of
    everything (fsdp), or its share within its machine (hsdp)."""
    timeout_minutes: float = 10.0
    """Under torchrun, how long a process waits for the others before it stops."""

    guard: GuardAction = "off"
    """What to do about a step whose loss or gradient norm stands out: nothing (off), say so (warn), leave it
    out (skip), or leave it out and stop (stop)."""
    guard_z: float = 6.0
    """How many standard deviations above the last steps' mean stand out."""
    guard_window: int = 128
    """How many steps a step is compared with; the first so many are not judged."""

    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 250
    """Steps between evaluations; the last step is always evaluated."""
    eval_tokens: int | None = 131_072
    """Validation tokens per evaluation, always the same ones; None is the whole validation split."""
    hellaswag: Path | None = None
    """Evaluate on these HellaSwag examples, a jsonl file with `ctx`, `endings` and `label`."""
    hellaswag_every: int = 1000
    """Steps between evaluations on HellaSwag; the last step is always evaluated."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the best and the last step are always kept."""
    sample_tokens: int = 300
    """Length of the sample that ends the run, and that TensorBoard gets at each evaluation; 0 for none."""
    sample_prompt: str = ""
    """How that sample starts. Without it a model of problems shows how it solves some."""

    def __post_init__(self) -> None:
        positive = (
            "max_steps",
            "batch_size",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "hellaswag_every",
        )
        for name in positive:
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("micro_batch_size", "eval_tokens"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1")
        for name in ("warmup_steps", "weight_decay", "grad_clip", "sample_tokens", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("val_fraction", "min_lr_fraction", "decay_fraction"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        _require(self.guard_window >= 2, "guard_window", self.guard_window, "at least 2")
        for name in ("learning_rate", "muon_learning_rate", "eps", "timeout_minutes", "guard_z"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "greater than 0")
        _require(
            all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "each at least 0, less than 1"
        )
        choices = {
            "precision": Precision,
            "weights": Weights,
            "recompute": Recompute,
            "parallel": Parallel,
            "guard": GuardAction,
            "schedule": Schedule,
            "optimizer": Optimizer,
            "tokenizer": TokenizerName,
        }
        for name, allowed in choices.items():
            _require(getattr(self, name) in get_args(allowed), name, getattr(self, name), get_args(allowed))
        if self.weights == "bf16":
            _require(self.precision in ("auto", "bf16"), "precision", self.precision, "bf16, as weights is")
        if self.parallel != "ddp":
            _require(self.precision != "fp16", "precision", "fp16", f"bf16 or fp32 with {self.parallel}")
        if self.optimizer == "muon":  # no fp32 masters, whole matrices, no step that the device may leave out
            _require(self.weights != "bf16", "weights", self.weights, "fp32 with optimizer = 'muon'")
            _require(self.parallel == "ddp", "parallel", self.parallel, "ddp with optimizer = 'muon'")
            _require(
                self.guard in ("off", "warn"), "guard", self.guard, "off or warn with optimizer = 'muon'"
            )
        if self.recompute == "gelu":
            activation = self.model.activation
            _require(activation.startswith("gelu"), "recompute", "gelu", f"none or block, with {activation}")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, default=str) + "\n"


def _require(holds: bool, name: str, value: object, allowed: object) -> None:
    if not holds:
        expected = f"one of {', '.join(allowed)}" if isinstance(allowed, tuple) else allowed
        raise InputError(f"{name} = {value!r}: it must be {expected}")


def config_fields() -> list[str]:
    """Every name that a YAML file may set: the fields of TrainConfig and, flat beside them, of GPTConfig."""
    own = [f.name for f in dataclasses.fields(TrainConfig) if f.name != "model"]
    return own + [f.name for f in dataclasses.fields(GPTConfig)]


def override(config: TrainConfig, values: dict[str, Any], *, source: str) -> TrainConfig:
    """`config` with some fields replaced; GPTConfig's stand flat among them or under `model`.

    Raises:
        InputError: an unknown name (the closest field is suggested) or a value of the wrong type.
    """
    flat = {**{k: v for k, v in values.items() if k != "model"}, **(values.get("model") or {})}
    model_types = {f.name: f.type for f in dataclasses.fields(GPTConfig)}
    types = {f.name: f.type for f in dataclasses.fields(TrainConfig)} | model_types
    for name in flat:
        if name not in config_fields():
            close = difflib.get_close_matches(name, config_fields(), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"the fields are {', '.join(config_fields())}"
            raise InputError(f"{source}: unknown field {name!r}: {hint}")
    flat = {name: _coerce(name, value, str(types[name]), source) for name, value in flat.items()}
    model = dataclasses.replace(config.model, **{k: v for k, v in flat.items() if k in model_types})
    return dataclasses.replace(config, model=model, **{k: v for k, v in flat.items() if k not in model_types})


def _coerce(name: str, value: Any, declared: str, source: str) -> Any:
    """A value read from JSON or YAML as the type its field declares."""
    scalar = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "Path": (str,)}
    base = declared.removesuffix(" | None")
    if value is None and base != declared:
        return None
    if base.startswith("tuple"):
        if isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
            return tuple(value)
        raise InputError(f"{source}: {name} = {value!r}: it must be a list of two numbers")
    wanted = scalar.get(base, (str,))
    if base == "float" and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as a string
        except ValueError:
            pass
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise InputError(f"{source}: {name} = {value!r}: it must be of type {declared}")
    return Path(str(value)) if base == "Path" else value


_CHAR_CPU = TrainConfig(
    model=GPTConfig(block_size=64, n_layer=4, n_head=4, n_embd=128),
    tokenizer="char",
    max_steps=2000,
    batch_size=12,
    learning_rate=4e-3,  # chosen on the training split: docs/char-cpu.md
    betas=(0.9, 0.99),
)
_CHAR = TrainConfig(
    model=GPTConfig(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2),
    tokenizer="char",
    max_steps=5000,
    batch_size=64,
    learning_rate=1e-3,
    betas=(0.9, 0.99),
)


def _gpt2(
    n_layer: int, n_head: int, n_embd: int, learning_rate: float, micro_batch_size: int = 8
) -> TrainConfig:
    """The GPT-2 reproduction: 2^19 tokens a step, 10B tokens, learning rates of GPT-3's table 2.1."""
    return TrainConfig(
        model=GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd),
        max_steps=19_073,
        batch_size=512,
        micro_batch_size=micro_batch_size,
        learning_rate=learning_rate,
        warmup_steps=715,
        checkpoint_every=1000,
        eval_tokens=1_310_720,
    )


def _modern(config: TrainConfig, muon_learning_rate: float | None = None) -> TrainConfig:
    """The same budget with what came after GPT-2 (docs/modern.md)."""
    model = dataclasses.replace(
        config.model,
        position="rope",
        norm="rms_norm",
        qk_norm=True,
        activation="relu2",
        bias=False,
        tied_head=False,
    )
    return dataclasses.replace(config, model=model, optimizer="muon", muon_learning_rate=muon_learning_rate)


_ADDITION = TrainConfig(
    model=GPTConfig(block_size=12, n_layer=2, n_head=4, n_embd=128),
    corpus="addition",
    tokenizer="char",
    max_steps=800,
    batch_size=128,
    optimizer="muon",  # AdamW at 4e-3 needs many times the steps: docs/exercises.md
    learning_rate=4e-3,
    muon_learning_rate=1.6e-2,
    betas=(0.9, 0.99),
    eval_every=100,
    eval_tokens=24_000,
)
_CALCULATOR = dataclasses.replace(
    _ADDITION,
    model=GPTConfig(block_size=160, n_layer=3, n_head=4, n_embd=128),
    corpus="calculator",
    max_steps=2000,
    batch_size=32,
    eval_every=500,
    eval_tokens=160_000,
)

PRESETS: dict[str, TrainConfig] = {
    "addition": _ADDITION,
    "calculator": _modern(_CALCULATOR, 1.6e-2),
    "char-cpu": _CHAR_CPU,
    "modern-cpu": _modern(_CHAR_CPU, 1.6e-2),  # chosen on the training split: docs/modern.md
    "char": _CHAR,
    "gpt2": _gpt2(12, 12, 768, 6e-4),
    "gpt2-medium": _gpt2(24, 16, 1024, 3e-4),
    "gpt2-large": _gpt2(36, 20, 1280, 2.5e-4),
    "gpt2-xl": _gpt2(48, 25, 1600, 2e-4),
    # The same by their sizes, in larger micro-batches, meant for GPUs of 80 GB (not tried on one yet).
    "gpt2-124m": _gpt2(12, 12, 768, 6e-4, micro_batch_size=64),
    "gpt2-350m": _gpt2(24, 16, 1024, 3e-4, micro_batch_size=32),
    "gpt2-774m": _gpt2(36, 20, 1280, 2.5e-4, micro_batch_size=16),
    "gpt2-1.5b": _gpt2(48, 25, 1600, 2e-4, micro_batch_size=8),
    "modern": _modern(_gpt2(12, 12, 768, 6e-4, micro_batch_size=64)),
}


def preset(name: str) -> TrainConfig:
    """The preset of that name. Raises InputError, naming the closest one, when there is none."""
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown preset {name!r}: {hint}choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
