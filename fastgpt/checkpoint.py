"""Checkpoints: written whole or not at all, verified when read, and free of pickle.

RUN/checkpoints/step-000500/
    model.safetensors       weights
    training.safetensors    optimizer and random generator states
    optimizer/              the optimizer's states instead, where they are split over ranks: a file of each
    config.json             GPTConfig
    tokenizer.json          the tokenizer
    state.json              step, losses, data fingerprint, gradient scaler, which optimizer
    SHA256SUMS              of all the others (`sha256sum -c` reads it)

A checkpoint is written under a temporary name and renamed when all of it is on disk, so a folder that is
called step-N is complete. The best by validation loss and the last two are kept.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.config import GPTConfig
from fastgpt.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from fastgpt.errors import InputError
from fastgpt.files import fsync, sha256_of

FOLDER = "checkpoints"
SUMS = "SHA256SUMS"
SHARDS = "optimizer"
_PREFIX = "step-"
_UNFINISHED = ".writing-"
_KEEP_LAST = 2


class DamagedCheckpoint(InputError):
    """A file of a checkpoint is missing or is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint; tensors are on the CPU."""

    path: Path
    config: GPTConfig
    tokenizer: Tokenizer
    state: dict[str, Any]
    model: dict[str, Tensor]

    def training(self) -> dict[str, Tensor]:
        """Optimizer and random generator states."""
        return load_file(self.path / "training.safetensors")


def save(
    run: Path,
    *,
    config: GPTConfig,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    model: dict[str, Tensor],
    training: dict[str, Tensor],
    write_shards: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of step `state["step"]`, then delete those no longer kept. Returns its folder.

    `write_shards`, with which other ranks write their parts, is called with the folder for them.

    Raises:
        InputError: it could not be written (a full disk, for one); earlier checkpoints are untouched.
    """
    final = path_of(run, state["step"])
    if final.exists():
        return final  # complete, and training is deterministic: it holds the same bits
    unfinished = _unfinished(final)
    remove_unfinished(run)
    try:
        unfinished.mkdir(parents=True)
        (unfinished / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
        (unfinished / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        save_tokenizer(tokenizer, unfinished)
        if write_shards is not None:
            (unfinished / SHARDS).mkdir()
            write_shards(unfinished / SHARDS)
        save_file(model, unfinished / "model.safetensors")
        save_file(training, unfinished / "training.safetensors")
        _write_sums(unfinished)
        unfinished.rename(final)
        fsync(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        kept = checkpoints(run)
        survivor = f"{kept[-1]} is intact; --resume continues from it" if kept else "there is no earlier one"
        raise InputError(f"could not write the checkpoint {final}: {error}. {survivor}") from error
    _prune(run)
    return final


def path_of(run: Path, step: int) -> Path:
    """The folder that the checkpoint of that step has, or would have."""
    return run / FOLDER / f"{_PREFIX}{step:06d}"


def shards_of(run: Path, step: int) -> Path:
    """Where the ranks put their parts while the checkpoint of that step is being written."""
    return _unfinished(path_of(run, step)) / SHARDS


def _unfinished(final: Path) -> Path:
    return final.with_name(_UNFINISHED + final.name)


def _write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in files]
    (folder / SUMS).write_text("".join(lines))
    for path in folder.rglob("*"):
        fsync(path)
    fsync(folder)


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, by step."""
    return sorted((run / FOLDER).glob(f"{_PREFIX}*"), key=lambda path: int(path.name.removeprefix(_PREFIX)))


def remove_unfinished(run: Path) -> None:
    """Delete what a killed process left half-written."""
    for path in (run / FOLDER).glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _val_loss(path: Path) -> float:
    try:
        value = json.loads((path / "state.json").read_text())["val_loss"]
    except (OSError, ValueError, KeyError):
        return float("inf")
    return float("inf") if value is None else float(value)


def best(run: Path) -> Path:
    """The checkpoint with the lowest validation loss, the last one if none was evaluated."""
    return min(reversed(checkpoints(run)), key=_val_loss)


def _prune(run: Path) -> None:
    remove_unfinished(run)
    every = checkpoints(run)
    keep = {best(run), *every[-_KEEP_LAST:]}
    for path in every:
        if path not in keep:
            gone = path.with_name(_UNFINISHED + path.name)
            path.rename(gone)  # a kill while deleting must not leave a damaged step-N
            shutil.rmtree(gone, ignore_errors=True)


def find(run_or_checkpoint: str | Path, which: str = "best") -> Path:
    """The folder of a checkpoint: of this very one, or of the `best` or `last` of a run.

    Raises:
        InputError: there is none.
    """
    path = Path(run_or_checkpoint)
    if (path / "model.safetensors").exists():
        return path
    if not path.is_dir():
        raise InputError(
            f"{path}: no such folder; expected a run that `fastgpt train` wrote, or a checkpoint in it"
        )
    if not checkpoints(path):
        raise InputError(f"{path} holds no complete checkpoint (looked for {path / FOLDER / _PREFIX}*)")
    return best(path) if which == "best" else checkpoints(path)[-1]


def load(path: Path) -> Checkpoint:
    """Read and verify one checkpoint folder.

    Raises:
        DamagedCheckpoint: a file differs from what was written; the message names it, and an intact
            checkpoint of the same run if there is one.
    """
    try:
        verify(path)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{error} {_offer_another(path)}") from None
    config = GPTConfig(**json.loads((path / "config.json").read_text()))
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None  # verified above
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, config, tokenizer, state, load_file(path / "model.safetensors"))


def verify(path: Path) -> None:
    """Compare every file with SHA256SUMS.

    Raises:
        DamagedCheckpoint: naming the first file that is missing or differs.
    """
    sums = path / SUMS
    try:
        lines = [line.split("  ", 1) for line in sums.read_text().splitlines()]
        expected = {name: digest for digest, name in lines}
    except (OSError, ValueError):
        raise DamagedCheckpoint(f"{sums} is missing or damaged: the checkpoint cannot be verified.") from None
    required = {"config.json", "model.safetensors", "state.json", "tokenizer.json", "training.safetensors"}
    for name in sorted(required | set(expected)):
        file = path / name
        if not file.is_file() or name not in expected:
            raise DamagedCheckpoint(f"{file} is missing, or missing from {SUMS}: the checkpoint is damaged.")
        if sha256_of(file) != expected[name]:
            raise DamagedCheckpoint(f"{file} is damaged: its sha256 is not the one recorded in {SUMS}.")


def _offer_another(path: Path) -> str:
    for other in reversed(checkpoints(path.parent.parent)):
        if other == path:
            continue
        try:
            verify(other)
        except DamagedCheckpoint:
            continue
        return f"{other} is intact: use it by that name, or delete {path} and --resume continues from it."
    return "There is no other intact checkpoint in this run."


def model_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> dict[str, Tensor]:
    """The weights by name; in fp32 where the optimizer keeps masters of what the model has rounded.

    Where they are split over ranks all of them take part, and those that `keep` get them whole.
    """
    from fastgpt.sharding import whole  # slow to import, and for training only

    masters = {name: optimizer.state.get(p, {}).get("master", p) for name, p in model.named_parameters()}
    return {
        name: whole(masters.get(name, value).detach(), keep=keep).float()
        for name, value in model.state_dict().items()
    }


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, `transformer.wte.weight:exp_avg`, ..., less the masters."""
    return {
        f"{name}:{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
        if key != "master"
    }


def read_optimizer_tensors(
    model: torch.nn.Module, saved: Checkpoint, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What `optimizer_tensors` had, split as the model is, however it was split when it was saved.

    Args:
        model: whose parameters the tensors belong to.
        saved: the checkpoint.
        tensors: of its training.safetensors, where it was not split.
    """
    from fastgpt.sharding import like, load_shards  # slow to import, and for training only

    parameters = dict(model.named_parameters())
    if not (shards := saved.path / SHARDS).exists():
        return {name: like(value, parameters[name.rsplit(":", 1)[0]]) for name, value in tensors.items()}
    tensors = {}
    for name, p in parameters.items():
        tensors[f"{name}:step"] = torch.zeros((), dtype=torch.float32)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{name}:{moment}"] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
    load_shards(shards, tensors)
    return tensors


def load_optimizer_tensors(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    weights: dict[str, Tensor],
) -> None:
    """Put back what `optimizer_tensors` took out, and `weights` as masters where the model's are rounded."""
    rounded = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    masters = {f"{name}:master": weights[name] for name in rounded if f"{name}:step" in tensors}
    names = {p: name for name, p in model.named_parameters()}
    order = [names[p] for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, value in {**tensors, **masters}.items():
        name, key = full_name.rsplit(":", 1)
        state.setdefault(order.index(name), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
