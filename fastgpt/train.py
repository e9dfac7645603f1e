"""The training loop: data in, checkpoints and curves out.

One optimizer step is `Trainer.step`; everything around it (evaluation, logging, checkpoints, interruption)
is `Trainer.run`. The state of a run is the step number, weights, optimizer, random generators and gradient
scaler: the data loader has none, because the step number alone says which samples come next.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastgpt import checkpoint, runtime
from fastgpt.config import CONFIG, GPTConfig, TrainConfig
from fastgpt.data import DownloadError, Loader, TokenDataset, Tokenizer, ValidationSet, prepared
from fastgpt.errors import InputError, TrainingStopped
from fastgpt.evaluate import validation_loss
from fastgpt.generate import encode_prompt, sample_text
from fastgpt.metrics import MetricsLog, plot_losses
from fastgpt.model import GPT
from fastgpt.optim import adamw
from fastgpt.pretrained import Pretrained, load_weights, read_pretrained
from fastgpt.schedule import learning_rate
from fastgpt.tasks import HellaSwag

IGNORE_INDEX = -100
_EVAL_BATCH_TOKENS = 4096  # larger batches use a CPU better; the logits of this many tokens fit anywhere


class Trainer:
    """The state of a run and the step that advances it.

    Args:
        config: the run's settings.
        out_dir: the run's folder.
        data: tokens and their tokenizer.
        model: on the CPU, with its initial weights.
    """

    def __init__(self, config: TrainConfig, out_dir: Path, data: TokenDataset, model: GPT) -> None:
        self.config, self.data, self.out_dir = config, data, out_dir
        self.device = runtime.resolve_device(config.device)
        self.precision = runtime.resolve_precision(config.precision, self.device)
        self.model = model.to(self.device)
        self.network: Callable[..., Any] = torch.compile(self.model) if config.compile else self.model
        self.optimizer = adamw(self.model, config)
        self.scaler = self.precision.scaler()
        block_size, vocab_size = config.model.block_size, data.tokenizer.vocab_size
        self.loader = Loader(
            data.train,
            block_size,
            config.batch_size,
            seed=config.seed,
            vocab_size=vocab_size,
            names=data.names["train"],
        )
        limit = None if config.eval_tokens is None else max(1, config.eval_tokens // block_size)
        self.validation = ValidationSet(
            data.val, block_size, max_windows=limit, vocab_size=vocab_size, names=data.names["val"]
        )
        encode_prompt(data.tokenizer, config.sample_prompt)  # an error now, not after the training
        self.hellaswag = HellaSwag.open(config.hellaswag, data.tokenizer) if config.hellaswag else None
        self.steps_done = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints not counted
        self.val_loss: float | None = None  # of the weights as they are now
        self.best_val_loss = math.inf
        self._sample: str | None = None  # by the weights as they are now
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    # -- one step ----------------------------------------------------------------------------------------

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns its loss and the gradient's norm before clipping, on the device.

        Each micro-batch contributes the sum of its losses over the number of tokens of the whole batch, so
        that the gradient is the batch's own however it is split.
        """
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, config)
        micro_batches = self.loader.micro_batches(
            self.steps_done, config.micro_batch_size or config.batch_size
        )
        tokens = sum(int((targets != IGNORE_INDEX).sum()) for _, targets in micro_batches)
        loss = torch.zeros((), device=self.device)
        for x, y in micro_batches:
            with self.precision.autocast():
                _, summed = self.network(
                    self._to_device(x), self._to_device(y), reduction="sum", return_logits=False
                )
            self.scaler.scale(summed / tokens).backward()
            loss += summed.detach() / tokens
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        self.val_loss = self._sample = None
        self._unchecked.append((self.steps_done, loss, norm))
        return loss, norm

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def check_finite(self) -> None:
        """Look at the losses and gradients since the last look; one transfer for all of them.

        Raises:
            TrainingStopped: one is NaN or infinite. (In fp16 the scaler skips steps with infinite gradients.)
        """
        if not self._unchecked:
            return
        losses = torch.stack([loss for _, loss, _ in self._unchecked]).tolist()
        norms = torch.stack([norm for _, _, norm in self._unchecked]).tolist()
        steps = [step for step, _, _ in self._unchecked]
        self._unchecked.clear()
        for step, loss, norm in zip(steps, losses, norms, strict=True):
            if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
                continue
            kept = checkpoint.checkpoints(self.out_dir)
            survivor = (
                f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was written yet."
            )
            raise TrainingStopped(
                f"step {step}: loss {loss}, gradient norm {norm}. {survivor} A lower --learning-rate, "
                "a longer --warmup-steps or another --precision may help."
            )

    # -- evaluation and checkpoints ----------------------------------------------------------------------

    def evaluate(self) -> float:
        """The loss on the fixed validation windows."""
        micro = self.config.micro_batch_size or self.config.batch_size
        self.val_loss = validation_loss(
            self.model,
            self.validation,
            forward=self.network,
            batch_size=max(micro, _EVAL_BATCH_TOKENS // self.config.model.block_size),
            device=self.device,
            autocast=self.precision.autocast(),
        )
        return self.val_loss

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        self.check_finite()
        generators = runtime.rng_state(self.device)
        state = {
            "step": self.steps_done,
            "seconds": self.seconds,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "data": self.data.fingerprint,
            "scaler": self.scaler.state_dict(),
        }
        return checkpoint.save(
            self.out_dir,
            config=self.model.config,
            tokenizer=self.data.tokenizer,
            state=state,
            model=self.model.state_dict(),
            training={
                **checkpoint.optimizer_tensors(self.model, self.optimizer),
                **{f"rng:{name}": tensor for name, tensor in generators.items()},
            },
        )

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint of the same run, to the bit.

        Raises:
            InputError: the data or the network is not what the run was trained with.
        """
        shape = dataclasses.replace(self.config.model, dropout=saved.config.dropout)
        if shape != saved.config:
            raise InputError(f"{saved.path} is of another shape: {saved.config}, not {shape}")
        if saved.state["data"] != self.data.fingerprint:
            raise InputError(
                f"the tokens of corpus {self.config.corpus!r} are not those that {saved.path} was trained "
                "on: restore the text, or start a new run with --init-from"
            )
        self.model.load_state_dict(saved.model)
        training = saved.training()
        generators = {k.removeprefix("rng:"): training.pop(k) for k in list(training) if k.startswith("rng:")}
        checkpoint.load_optimizer_tensors(self.model, self.optimizer, training)
        self.scaler.load_state_dict(saved.state["scaler"])
        self.steps_done = saved.state["step"]
        self.seconds = saved.state["seconds"]
        self.val_loss, self._sample = saved.state["val_loss"], None
        best = saved.state["best_val_loss"]
        self.best_val_loss = math.inf if best is None else best
        runtime.set_rng_state(generators, self.device)

    # -- the loop ----------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to max_steps, or until interrupted. Returns the last checkpoint.

        Raises:
            TrainingStopped: the loss is no longer finite.
        """
        config = self.config
        log = MetricsLog(self.out_dir, first_step=self.steps_done, total_steps=config.max_steps)
        benchmarks = (config.hellaswag_every,) if self.hellaswag else ()
        self.model.train()
        self._since = (time.perf_counter(), self.steps_done)
        try:
            with _interruptible() as interrupted:
                while self.steps_done < config.max_steps and not interrupted():
                    loss, norm = self.step()
                    log.advance()
                    if self._due(config.log_every, config.eval_every, config.checkpoint_every, *benchmarks):
                        self._look(loss, norm, log)
        finally:
            log.close()
        return self.save()

    def _due(self, *every: int) -> bool:
        return self.steps_done == self.config.max_steps or any(self.steps_done % n == 0 for n in every)

    def _look(self, loss: Tensor, norm: Tensor, log: MetricsLog) -> None:
        """Log the step just done; evaluate and save where they are due."""
        self.check_finite()
        start, first = self._since
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        improved = False
        if self._due(self.config.eval_every):
            val_loss = self.evaluate()
            improved = val_loss < self.best_val_loss
            self.best_val_loss = min(self.best_val_loss, val_loss)
        row = self._row(loss.item(), norm.item(), (self.steps_done - first) / elapsed)
        if self.hellaswag and self._due(self.config.hellaswag_every):
            with self.precision.autocast():
                row |= {f"hellaswag_{k}": v for k, v in self.hellaswag.evaluate(self.model).items()}
        log.log(row)
        if improved or self._due(self.config.checkpoint_every):
            self.save()
        if self.val_loss is not None and self.config.sample_tokens:
            log.sample(self.sample(), self.steps_done)
        self._since = (time.perf_counter(), self.steps_done)

    def _row(self, loss: float, norm: float, steps_per_second: float) -> dict[str, Any]:
        tokens_per_step = self.config.batch_size * self.config.model.block_size
        tokens_per_s = steps_per_second * tokens_per_step
        peak = self.precision.peak_flops()
        return {
            "step": self.steps_done,
            "tokens": self.steps_done * tokens_per_step,
            "train_loss": loss,
            "val_loss": self.val_loss,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm
            if math.isfinite(norm)
            else None,  # infinite where the fp16 scaler skipped the step
            "tokens_per_s": tokens_per_s,
            "mfu": tokens_per_s * self.model.flops_per_token() / peak if peak else None,
            "seconds": self.seconds,
        }

    def sample(self) -> str:
        """A continuation of sample_prompt by the weights as they are."""
        if self._sample is None:
            config = self.config
            self._sample = sample_text(
                self.model, self.data.tokenizer, config.sample_prompt, config.sample_tokens, seed=config.seed
            )
        return self._sample


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or SIGTERM came; the second Ctrl-C stops at once."""
    received: list[int] = []

    def note(signum: int, _: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- from a configuration to a run ---------------------------------------------------------------------------


def train(config: TrainConfig) -> Trainer:
    """Prepare data and model as `config` says, train, and leave a run folder behind. Returns the trainer.

    Raises:
        InputError: something in the input is wrong; nothing was overwritten.
        TrainingStopped: the loss became NaN or infinite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("one of several processes (WORLD_SIZE > 1): fastgpt train runs in a single one")
    out_dir = config.out_dir
    if out_dir is None:
        raise InputError("out_dir is not set: name the folder for the run")
    device = runtime.resolve_device(config.device)
    resumed = checkpoint.load(checkpoint.find(out_dir, "last")) if config.resume else None
    source = resumed or _starting_weights(config, out_dir)
    data, config = open_data(config, source.tokenizer if source else None)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if source is not None:
        load_weights(model, source)
    trainer = Trainer(config, out_dir, data, model)
    if resumed is not None:
        trainer.restore(resumed)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / CONFIG).write_text(config.to_json())
    (out_dir / "environment.json").write_text(json.dumps(runtime.environment(device), indent=2) + "\n")
    _announce(trainer)
    trainer.run()
    plot_losses(out_dir)
    return trainer


def _starting_weights(config: TrainConfig, out_dir: Path) -> Pretrained | checkpoint.Checkpoint | None:
    """What a new run starts from; None for random weights."""
    if checkpoint.checkpoints(out_dir):
        raise InputError(
            f"{out_dir} already holds a run: add --resume to continue it, or choose another --out-dir"
        )
    return read_pretrained(config.init_from) if config.init_from else None


def open_data(config: TrainConfig, tokenizer: Tokenizer | None) -> tuple[TokenDataset, TrainConfig]:
    """The tokens of config.corpus, and the config with corpus and vocabulary resolved.

    Args:
        config: names the corpus, and the tokenizer where none is given.
        tokenizer: of the weights that training starts from.
    """
    chosen = tokenizer or config.tokenizer
    try:
        folder = prepared(config.corpus, chosen, val_fraction=config.val_fraction)
    except DownloadError as error:
        if config.fallback_corpus is None:
            raise
        print(f"{error}: training on {config.fallback_corpus!r} instead")
        config = dataclasses.replace(config, corpus=config.fallback_corpus)
        folder = prepared(config.corpus, chosen, val_fraction=config.val_fraction)
    data = TokenDataset.open(folder)
    if tokenizer is not None and data.tokenizer != tokenizer:
        raise InputError(
            f"the tokens in {folder} are of another vocabulary ({data.tokenizer.name}, "
            f"{data.tokenizer.vocab_size} tokens) than the weights' ({tokenizer.name}, "
            f"{tokenizer.vocab_size} tokens): train on text instead, and it is tokenised to fit"
        )
    vocab_size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (vocab_size, GPTConfig.vocab_size):
        raise InputError(
            f"vocab_size = {config.model.vocab_size}, but the {data.tokenizer.name} tokenizer of this data "
            f"has {vocab_size} tokens: leave vocab_size out"
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return data, dataclasses.replace(config, model=model)


def _announce(trainer: Trainer) -> None:
    config, data, model = trainer.config, trainer.data, trainer.config.model
    tokenizer, sequences = data.tokenizer, config.max_steps * config.batch_size
    train_tokens, val_tokens = (sum(map(len, shards)) for shards in (data.train, data.val))
    epochs = trainer.loader.epoch_of(config.max_steps)
    lines = {
        "data": f"{config.corpus}: {train_tokens:,} training and {val_tokens:,} validation tokens "
        f"({tokenizer.name}, {tokenizer.vocab_size} in the vocabulary)",
        "model": f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
        f"block {model.block_size}: {trainer.model.num_params():,} parameters",
        "training": f"{config.max_steps} steps of {config.batch_size} sequences "
        f"= {sequences * model.block_size:,} tokens, {epochs:.1f} epochs",
        "computing": f"{trainer.precision.name} on {trainer.device}, {torch.get_num_threads()} CPU threads",
        "run": f"{trainer.out_dir}" + (f", after step {trainer.steps_done}" if trainer.steps_done else ""),
    }
    print("\n".join(f"{name:<10} {line}" for name, line in lines.items()), flush=True)
