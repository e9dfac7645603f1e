"""The training loop: data in, checkpoints and curves out.

One optimizer step is `Trainer.step`; everything around it (evaluation, logging, checkpoints, interruption)
is `Trainer.run`. The state of a run is the step number, weights, optimizer, random generators and gradient
scaler: the data loader has none, because the step number alone says which samples come next. Under torchrun
every rank has a Trainer and calls its methods in the same order.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt import checkpoint, distributed, runtime, sharding, stability
from fastgpt.config import GPTConfig, TrainConfig
from fastgpt.data import Batch, Dataset, DownloadError, Prefetcher, ProblemSet, Tokenizer, open_dataset
from fastgpt.distributed import World
from fastgpt.errors import InputError
from fastgpt.evaluate import validation_loss
from fastgpt.exam import Exam
from fastgpt.generate import encode_prompt, sample_text
from fastgpt.metrics import MetricsLog, Silent, announce, plot_losses, step_row, write_record
from fastgpt.model import GPT
from fastgpt.muon import optimizer_for
from fastgpt.optim import update
from fastgpt.pretrained import Pretrained, load_weights, read_pretrained
from fastgpt.schedule import learning_rate
from fastgpt.tasks import HellaSwag

_EVAL_BATCH_TOKENS = 4096  # larger batches use a CPU better; the logits of this many tokens fit anywhere


class Trainer:
    """The state of a run and the step that advances it.

    Args:
        config: the run's settings.
        out_dir: the run's folder.
        data: what to train on, and its tokenizer.
        model: on the CPU, with its initial weights.
        world: the processes that train it together; by default this one alone.
    """

    def __init__(
        self, config: TrainConfig, out_dir: Path, data: Dataset, model: GPT, world: World | None = None
    ) -> None:
        self.config, self.data, self.out_dir = config, data, out_dir
        self.world = world or World(runtime.resolve_device(config.device))
        self.device = self.world.device
        self.precision = runtime.resolve_precision(
            config.precision, self.device, config.weights, masters=config.optimizer == "adamw"
        )
        self.model = model.to(self.device)
        self.model.recompute(config.recompute)
        self.parallel = sharding.arranged(self.model, self.world, config.parallel, self.precision.weights)
        self.network: Callable[..., Any] = torch.compile(self.parallel) if config.compile else self.parallel
        self.optimizer = optimizer_for(self.model, config)
        self.scaler = self.precision.scaler(shared=self.world.size > 1)
        block_size = config.model.block_size
        self.loader = data.loader(block_size, config.batch_size, seed=config.seed)
        self.prefetch = Prefetcher(self._micro_batches, self.device)
        limit = None if config.eval_tokens is None else max(1, config.eval_tokens // block_size)
        validation = data.validation(block_size, max_samples=limit)
        self.share = self.world.rank, self.world.size  # this rank's, of whatever is evaluated
        self.validation = validation.share(*self.share)
        encode_prompt(data.tokenizer, config.sample_prompt)  # an error now, not after the training
        self.hellaswag = HellaSwag.open(config.hellaswag, data.tokenizer) if config.hellaswag else None
        self.exam = Exam.of(data, limit) if isinstance(data, ProblemSet) else None
        self.scores: dict[str, float] = {}  # in the last exam
        self.steps_done = 0
        self.seconds = 0.0  # of training, evaluations and checkpoints not counted
        self.val_loss: float | None = None  # of the weights as they are now
        self.best_val_loss = math.inf
        self._sample: str | None = None  # by the weights as they are now
        self.guard = stability.Guard(config, self.world, scaled=self.scaler.is_enabled())
        self.growth = stability.Growth(self.model, data, self.device)

    # -- one step ----------------------------------------------------------------------------------------

    def step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step. Returns its loss and the gradient's norm before clipping, on the device.

        Each micro-batch contributes the sum of its losses over the number of tokens of the whole batch, so
        that the gradient is the batch's own however it is split. Gradients are averaged over ranks, which
        makes that number a rank's share of it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, self.config, group.get("initial_lr"))
        batches = self.prefetch(self.steps_done)
        tokens = self.world.mean(torch.full((), float(batches.counted), device=self.device))
        loss = torch.zeros((), device=self.device)
        for number, (x, y) in enumerate(batches.micro_batches, 1):
            last = number == len(batches.micro_batches)
            with sharding.accumulating(self.parallel, self.config.parallel, last=last):
                with self.precision.autocast():
                    _, summed = self.network(x, y, reduction="sum", return_logits=False)
                self.scaler.scale(summed / tokens).backward()
            loss += summed.detach() / tokens
        self.world.mean(loss)
        self.steps_done += 1
        norm = update(
            self.optimizer,
            self.scaler,
            self.config.grad_clip,
            veto=self.guard.veto(self.steps_done, loss),
            look=self.growth.look if self._due(self.config.eval_every) else None,
        )
        self.val_loss = self._sample = None
        self.guard.done(self.steps_done, loss, norm)
        return loss, norm

    def _micro_batches(self, step: int) -> list[Batch]:
        """This rank's rows of a step."""
        rows = self.config.micro_batch_size or self.config.batch_size
        return self.loader.micro_batches(step, rows, self.world.rank, self.world.size)

    def check(self) -> None:
        """Look at the steps since the last look. Raises TrainingStopped for NaN, or by the guard."""
        self.guard.check(self.out_dir, self._save_as)

    def _save_as(self, step: int) -> Path:
        """The state as it is, which is that after `step`: the guard left out what came since."""
        self.steps_done, self.val_loss = step, None
        return self.save()

    # -- evaluation and checkpoints ----------------------------------------------------------------------

    def evaluate(self) -> float:
        """The loss on the fixed validation samples, of which each rank takes its share."""
        micro = self.config.micro_batch_size or self.config.batch_size
        self.val_loss = validation_loss(
            self.model,
            self.validation,
            forward=self.network,
            batch_size=max(micro, _EVAL_BATCH_TOKENS // self.config.model.block_size),
            device=self.device,
            autocast=self.precision.autocast(),
            mean=self.world.mean,
        )
        sharding.split_again(self.model)
        return self.val_loss

    def save(self) -> Path:
        """Write a checkpoint of the current step."""
        self.check()
        generators = {
            f"rng:{rank}:{name}": state
            for name, own in runtime.rng_state(self.device).items()
            for rank, state in enumerate(self.world.gather(own))
        }
        others = {**generators, **self.guard.tensors()}
        path = checkpoint.path_of(self.out_dir, self.steps_done)
        if self.world.from_main(path.exists()):
            return path  # complete, and training is deterministic: it holds the same bits
        weights = checkpoint.model_tensors(self.model, self.optimizer, keep=self.world.main)
        optimizer = checkpoint.optimizer_tensors(self.model, self.optimizer)
        write_shards = self._write_shards if optimizer and sharding.is_split(self.model) else None
        if not self.world.main:
            if write_shards:
                write_shards(checkpoint.shards_of(self.out_dir, self.steps_done))
            return path
        state = {
            "step": self.steps_done,
            "seconds": self.seconds,
            "val_loss": self.val_loss,
            "best_val_loss": self.best_val_loss if math.isfinite(self.best_val_loss) else None,
            "data": self.data.fingerprint,
            "scaler": self.scaler.state_dict(),
            "optimizer": self.config.optimizer,
        }
        return checkpoint.save(
            self.out_dir,
            config=self.model.config,
            tokenizer=self.data.tokenizer,
            state=state,
            model=weights,
            training=others if write_shards else {**optimizer, **others},
            write_shards=write_shards,
        )

    def _write_shards(self, folder: Path) -> None:
        """This rank's part of a checkpoint, in a folder that rank 0 has made by then."""
        self.world.barrier()
        sharding.save_shards(folder, checkpoint.optimizer_tensors(self.model, self.optimizer))

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint of the same run; to the bit where as many ranks wrote it.

        Raises:
            InputError: the data, the network or the optimizer is not what the run was trained with.
        """
        shape = dataclasses.replace(self.config.model, dropout=saved.config.dropout)
        if shape != saved.config:
            raise InputError(f"{saved.path} is of another shape: {saved.config}, not {shape}")
        if saved.state["data"] != self.data.fingerprint:
            raise InputError(
                f"the tokens of corpus {self.config.corpus!r} are not those that {saved.path} was trained "
                "on: restore the text, or start a new run with --init-from"
            )
        if (optimizer := saved.state.get("optimizer", "adamw")) != self.config.optimizer:
            raise InputError(f"{saved.path} has the state of optimizer = {optimizer!r}: resume with that")
        parameters = self.model.state_dict()
        self.model.load_state_dict({k: sharding.like(v, parameters[k]) for k, v in saved.model.items()})
        training = saved.training()
        generators = {name: training.pop(name) for name in list(training) if name.startswith("rng:")}
        self.guard.load({name: training.pop(name) for name in list(training) if name.startswith("guard:")})
        training = checkpoint.read_optimizer_tensors(self.model, saved, training)
        checkpoint.load_optimizer_tensors(self.model, self.optimizer, training, saved.model)
        self.scaler.load_state_dict(saved.state["scaler"])
        self.steps_done = saved.state["step"]
        self.seconds = saved.state["seconds"]
        self.val_loss, self._sample = saved.state["val_loss"], None
        best = saved.state["best_val_loss"]
        self.best_val_loss = math.inf if best is None else best
        own = f"rng:{self.world.rank}:"
        mine = {k.removeprefix(own): state for k, state in generators.items() if k.startswith(own)}
        if mine:
            runtime.set_rng_state(mine, self.device)
        else:  # of a rank that did not exist then
            torch.manual_seed(runtime.rank_seed(self.config.seed + self.steps_done, self.world.rank))

    # -- the loop ----------------------------------------------------------------------------------------

    def run(self) -> Path:
        """Train to max_steps, or until interrupted. Returns the last checkpoint.

        Raises:
            TrainingStopped: the loss is no longer finite.
        """
        config = self.config
        benchmarks = (config.hellaswag_every,) if self.hellaswag else ()
        log: MetricsLog | Silent = Silent()
        if self.world.main:
            log = MetricsLog(self.out_dir, first_step=self.steps_done, total_steps=config.max_steps)
        self.model.train()
        self._since = (time.perf_counter(), self.steps_done)
        stop = distributed.Vote(self.world)
        try:
            with runtime.interruptible() as interrupted, runtime.no_garbage_collection():
                while self.steps_done < config.max_steps and not stop(interrupted()):
                    loss, norm = self.step()
                    log.advance()
                    if self._due(config.log_every, config.eval_every, config.checkpoint_every, *benchmarks):
                        self._look(loss, norm, log)
        finally:
            log.close()
        return self.save()

    def _due(self, *every: int) -> bool:
        return self.steps_done == self.config.max_steps or any(self.steps_done % n == 0 for n in every)

    def _look(self, loss: Tensor, norm: Tensor, log: MetricsLog | Silent) -> None:
        """Log the step just done; evaluate and save where they are due."""
        self.check()
        start, first = self._since
        elapsed = time.perf_counter() - start
        self.seconds += elapsed
        improved = False
        if self._due(self.config.eval_every):
            val_loss = self.evaluate()
            improved = val_loss < self.best_val_loss
            self.best_val_loss = min(self.best_val_loss, val_loss)
        row = step_row(self, loss.item(), norm.item(), (self.steps_done - first) / elapsed) | self.guard.row()
        if self._due(self.config.eval_every):
            row |= self.growth.row(self.precision.autocast())
        log.log(row | self._benchmarks())
        if news := self.guard.news(row):
            self.world.say(news)
        if improved or self._due(self.config.checkpoint_every):
            self.save()
        if self.val_loss is not None and self.config.sample_tokens:
            log.sample(self.sample(), self.steps_done)
        if self._due(self.config.eval_every, self.config.checkpoint_every):
            gc.collect()
        self._since = (time.perf_counter(), self.steps_done)

    def _benchmarks(self) -> dict[str, float]:
        """What is due of the exam and HellaSwag; each rank takes its share, with all of the network."""
        exam = self.exam if self._due(self.config.eval_every) else None
        hellaswag = self.hellaswag if self._due(self.config.hellaswag_every) else None
        if not (exam or hellaswag):
            return {}
        model, total = sharding.whole_model(self.model, self.world, everywhere=True), self.world.sum
        if exam:
            self.scores = exam.share(*self.share).evaluate(model, total=total)
        found = dict(self.scores) if exam else {}
        if hellaswag:
            with self.precision.autocast():
                scores = hellaswag.share(*self.share).evaluate(model, total=total)
            found |= {f"hellaswag_{name}": score for name, score in scores.items()}
        return found

    def sample(self) -> str:
        """A continuation of sample_prompt by the weights as they are, or problems that they solve; on other
        ranks than 0, nothing."""
        if self._sample is None:
            config, model = self.config, sharding.whole_model(self.model, self.world)
            prompt, length = config.sample_prompt, config.sample_tokens
            if not self.world.main:
                self._sample = ""
            elif self.exam and not prompt:
                self._sample = self.exam.show(model)
            else:
                # No CUDA graph: a run is not to end because other threads use the GPU during a capture.
                self._sample = sample_text(
                    model, self.data.tokenizer, prompt, length, seed=config.seed, graph=False
                )
        return self._sample


# -- from a configuration to a run ---------------------------------------------------------------------------


def train(config: TrainConfig) -> Trainer:
    """Prepare data and model as `config` says, train, and leave a run folder behind. Returns the trainer.

    Raises:
        InputError: something in the input is wrong; nothing was overwritten.
        TrainingStopped: the loss became NaN or infinite, or the guard stopped it.
    """
    if config.out_dir is None:
        raise InputError("out_dir is not set: name the folder for the run")
    advice = "--resume continues from the last checkpoint"
    with distributed.joined(config.device, config.timeout_minutes, advice) as world:
        if world.device.type == "cpu":
            runtime.keep_freed_memory()
        out_dir = world.from_main(config.out_dir)  # its name may hold the time
        trainer = _trainer(dataclasses.replace(config, out_dir=out_dir), out_dir, world)
        if world.main:
            write_record(trainer)
            announce(trainer)
        trainer.run()
        if config.sample_tokens:
            trainer.sample()  # while all ranks are here; who asks later gets this one
        if world.main:
            plot_losses(out_dir)
    return trainer


def _trainer(config: TrainConfig, out_dir: Path, world: World) -> Trainer:
    """All that the run needs, as it was left if it is resumed."""
    resume = config.resume or (distributed.restarted() and checkpoint.checkpoints(out_dir))
    resumed = checkpoint.load(checkpoint.find(out_dir, "last")) if resume else None
    source = resumed or _starting_weights(config, out_dir)
    with world.one_first():
        data, config = open_data(config, source.tokenizer if source else None, world.say)
    torch.manual_seed(config.seed)
    model = GPT(config.model)
    if source is not None:
        load_weights(model, source)
    if world.rank:  # the same weights on all ranks, but not the same dropout
        torch.manual_seed(runtime.rank_seed(config.seed, world.rank))
    trainer = Trainer(config, out_dir, data, model, world)
    if resumed is not None:
        trainer.restore(resumed)
    return trainer


def _starting_weights(config: TrainConfig, out_dir: Path) -> Pretrained | checkpoint.Checkpoint | None:
    """What a new run starts from; None for random weights."""
    if checkpoint.checkpoints(out_dir):
        raise InputError(
            f"{out_dir} already holds a run: add --resume to continue it, or choose another --out-dir"
        )
    return read_pretrained(config.init_from) if config.init_from else None


def open_data(
    config: TrainConfig, tokenizer: Tokenizer | None, say: Callable[[str], None] = print
) -> tuple[Dataset, TrainConfig]:
    """The data of config.corpus, and the config with corpus and vocabulary resolved.

    Args:
        config: names the corpus, and the tokenizer where none is given.
        tokenizer: of the weights that training starts from.
        say: where a notice goes.
    """
    chosen = tokenizer or config.tokenizer
    try:
        data = open_dataset(config.corpus, chosen, val_fraction=config.val_fraction)
    except DownloadError as error:
        if config.fallback_corpus is None:
            raise
        say(f"{error}: training on {config.fallback_corpus!r} instead")
        config = dataclasses.replace(config, corpus=config.fallback_corpus)
        data = open_dataset(config.corpus, chosen, val_fraction=config.val_fraction)
    vocab_size = data.tokenizer.vocab_size
    if config.model.vocab_size not in (vocab_size, GPTConfig.vocab_size):
        raise InputError(
            f"vocab_size = {config.model.vocab_size}, but the {data.tokenizer.name} tokenizer of this data "
            f"has {vocab_size} tokens: leave vocab_size out"
        )
    model = dataclasses.replace(config.model, vocab_size=vocab_size)
    return data, dataclasses.replace(config, model=model)
