"""Steps that stand out, and what grows: a guard that leaves bad steps out, and the numbers to watch a run by.

The guard compares the loss and the logarithm of the gradient norm of a step with those of the last
`guard_window` steps:

    z = (x - mean) / (std + floor)           an outlier where z > guard_z for either, or x is not finite

Only upwards, and only once the window is full: a loss that still falls fast makes the window wide and z
negative. What enters the window is cut off at guard_z, so that one outlier does not hide the next. Where the
level has really changed, the window moves there within some steps, and the guard lets them pass.

All of it happens on the device. The host learns of it where it logs, so that a step waits for nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastgpt import checkpoint, sharding
from fastgpt.config import TrainConfig
from fastgpt.data import Dataset
from fastgpt.errors import TrainingStopped
from fastgpt.evaluate import evaluating
from fastgpt.model import GPT

if TYPE_CHECKING:
    from fastgpt.distributed import World

# Added to the standard deviations of the loss (nats) and of the norm's logarithm, so that where steps hardly
# differ none of them is an outlier.
FLOORS = (0.01, 0.05)
MOST_IN_A_ROW = 50  # steps left out one after another before a run stops: its weights are the trouble then
_HINT = "A lower --learning-rate, a longer --warmup-steps or another --precision may help."
PROBE_TOKENS = 1024  # whose logits are looked at
GROUPS = ("embedding", "attention", "mlp", "norm")


class Guard:
    """Judges steps, and keeps what it judges by in tensors on the device.

    Args:
        config: guard, guard_z and guard_window.
        world: the ranks, which leave a step out together.
        scaled: whether a gradient scaler skips steps whose gradients overflow, which are then no outliers.
    """

    def __init__(self, config: TrainConfig, world: World, *, scaled: bool = False) -> None:
        self.config, self.world, self.scaled = config, world, scaled
        device = world.device
        self._floors = torch.tensor(FLOORS, device=device)
        self._window = torch.zeros((2, config.guard_window), device=device)  # of loss and log norm
        self._z = torch.zeros(2, device=device)  # of the last step
        # Values that entered the window, outliers, outliers in a row, the step at which `stop` stopped, or 0.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._reported = 0
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []

    @property
    def on(self) -> bool:
        return self.config.guard != "off"

    def veto(self, step: int, loss: Tensor) -> Callable[[Tensor], Tensor | None] | None:
        """What `fastgpt.optim.update` is to ask, with the gradient norm, whether to leave the step out."""
        if not self.on:
            return None

        def judge(norm: Tensor) -> Tensor | None:
            outlier = self._judge(step, loss.detach(), norm.detach())
            return None if self.config.guard == "warn" else outlier

        return judge

    def _judge(self, step: int, loss: Tensor, norm: Tensor) -> Tensor:
        """1.0 for a step to leave out, else 0.0, on the device and equal on all ranks."""
        x = torch.stack([loss.float().reshape(()), norm.float().reshape(()).clamp(min=1e-30).log()])
        finite = x.isfinite()
        mean = self._window.mean(1)
        spread = self._window.std(1, correction=0) + self._floors
        full = self._counts[0] >= self._window.shape[1]
        z = torch.where(full, (x - mean) / spread, 0.0)
        overflowed = self.scaled & ~finite[1] & finite[0]
        outlier = ((z > self.config.guard_z) | ~finite).any() & ~overflowed
        if self.world.size > 1:
            shared = outlier.float()
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            outlier = shared > 0
        cut = torch.where(full, torch.minimum(x, mean + self.config.guard_z * spread), x)
        place = (self._counts[0] % self._window.shape[1]).reshape(1, 1).expand(2, 1)
        started, outliers, in_a_row, stopped = self._counts.unbind()
        entered = finite.all() & (stopped == 0)
        old = self._window.gather(1, place)
        self._window.scatter_(1, place, torch.where(entered, cut[:, None], old))
        self._z.copy_(torch.where(finite, z, torch.inf))
        in_a_row = torch.where(outlier, in_a_row + 1, 0)
        if self.config.guard == "stop":
            stopped = torch.where((stopped == 0) & outlier, step, stopped)
        self._counts.copy_(torch.stack([started + entered, outliers + outlier, in_a_row, stopped]))
        return (outlier | (stopped > 0)).float()  # once stopped nothing is done, until the host looks

    # -- what the host reads, where it logs ------------------------------------------------------------------

    def done(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Remember a step until the next `check`."""
        self._unchecked.append((step, loss, norm))

    def check(self, out_dir: Any, go_back: Callable[[int], Any]) -> None:
        """Look at the steps since the last look; a transfer or two for all of them.

        Args:
            out_dir: of the run.
            go_back: saves the state, which is that after the step it is given, and returns the checkpoint.

        Raises:
            TrainingStopped: an outlier where guard is `stop`, MOST_IN_A_ROW where it is `skip`; a loss or
                gradient that is not finite and was not left out. (In fp16 the scaler skips steps with
                infinite gradients.)
        """
        if not self._unchecked:
            return
        losses = torch.stack([loss for _, loss, _ in self._unchecked]).tolist()
        norms = torch.stack([norm for _, _, norm in self._unchecked]).tolist()
        steps = [step for step, _, _ in self._unchecked]
        self._unchecked.clear()
        rows = list(zip(steps, losses, norms, strict=True))
        if self.config.guard in ("skip", "stop"):
            self._check_left_out(rows, go_back)
            return
        for step, loss, norm in rows:
            if math.isfinite(loss) and (math.isfinite(norm) or self.scaled):
                continue
            kept = checkpoint.checkpoints(out_dir)
            survivor = (
                f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint was written yet."
            )
            raise TrainingStopped(f"step {step}: loss {loss}, gradient norm {norm}. {survivor} {_HINT}")

    def _check_left_out(self, rows: list[tuple[int, float, float]], go_back: Callable[[int], Any]) -> None:
        _, _, in_a_row, stopped = self._counts.tolist()
        if stopped:
            loss, norm = next((loss, norm) for step, loss, norm in rows if step == stopped)
            self._counts[3] = 0
            saved = go_back(stopped - 1)
            raise TrainingStopped(
                f"step {stopped}: loss {loss:.4g}, gradient norm {norm:.4g}: not finite, or more than "
                f"{self.config.guard_z:g} standard deviations above those of the last "
                f"{self.config.guard_window} steps. It was not done: {saved} is the state before it. "
                f"--resume --guard skip leaves it out. {_HINT}"
            )
        if in_a_row >= MOST_IN_A_ROW:
            step, loss, norm = rows[-1]
            saved = go_back(step)
            raise TrainingStopped(
                f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}. The guard left out {in_a_row} "
                f"steps in a row: it is the weights, not a batch. They are in {saved}; an earlier checkpoint "
                f"may do better. {_HINT}"
            )

    def row(self) -> dict[str, float | None]:
        """For metrics.jsonl: z of the last step, and how many outliers there were since the run began."""
        if not self.on:
            return {}
        loss_z, norm_z = (z if math.isfinite(z) else None for z in self._z.tolist())
        return {"loss_z": loss_z, "grad_norm_z": norm_z, "outliers": int(self._counts[1])}

    def news(self, row: dict[str, Any]) -> str | None:
        """A line on outliers since the last call; None where there were none."""
        new, self._reported = row.get("outliers", 0) - self._reported, row.get("outliers", 0)
        if new <= 0:
            return None
        what = "left out" if self.config.guard == "skip" else "done all the same"
        many = "outlier" if new == 1 else "outliers"
        return f"step {row['step']:>6}   guard: {new} {many} {what}, {self._reported} in all"

    def tensors(self) -> dict[str, Tensor]:
        """The state, for checkpoints: a resumed run judges as an uninterrupted one."""
        if not self.on:
            return {}
        return {
            "guard:window": self._window.cpu(),
            "guard:z": self._z.cpu(),
            "guard:counts": self._counts.cpu(),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `tensors` gave; another guard_window, or a run without a guard, begins anew."""
        window = tensors.get("guard:window")
        if not self.on or window is None or window.shape != self._window.shape:
            return
        self._window.copy_(window)
        self._z.copy_(tensors["guard:z"])
        self._counts.copy_(tensors["guard:counts"])
        self._reported = int(self._counts[1])


# -- what grows ----------------------------------------------------------------------------------------------


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """`grad_norm_GROUP` for the groups of parameters, on the device, before clipping; all ranks take part."""
    grads: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grads[_group(name)].append(p.grad)
    return {f"grad_norm_{group}": _norm(found) for group, found in grads.items() if found}


def _group(name: str) -> str:
    for part, group in ((".attn.", "attention"), (".mlp.", "mlp"), ("ln_", "norm")):
        if part in name:
            return group
    return "embedding"  # and an untied head


def _norm(grads: Iterable[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.linalg.vector_norm(
        torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms])
    )


class Growth:
    """What to watch beside the losses, for metrics.jsonl: logits and gradients.

    Args:
        model: split over ranks or not.
        data: PROBE_TOKENS of its validation split are looked at, by all ranks together.
        device: of the model.
    """

    def __init__(self, model: GPT, data: Dataset, device: torch.device) -> None:
        self._model, self._device = model, device
        block_size = model.config.block_size
        self._windows = data.validation(block_size, max_samples=max(1, PROBE_TOKENS // block_size))
        self._norms: dict[str, Tensor] = {}

    def look(self) -> None:
        """Remember the norms of the gradients as they are now."""
        self._norms = gradient_norms(self._model)

    def row(self, autocast: contextlib.AbstractContextManager[Any]) -> dict[str, float]:
        """Those norms, and of the weights as they are the largest |logit| and the mean log sum exp logits.

        Logits that grow without the loss falling come before many a divergence; z-loss is there to hold the
        second down (Chowdhery et al., PaLM, arXiv 2204.02311, section 5).
        """
        largest, total, rows = (torch.zeros((), device=self._device) for _ in range(3))
        with evaluating(self._model), autocast:
            for x, _ in self._windows.batches(1):
                logits = self._model(torch.from_numpy(x).to(self._device))[0].float()  # (1, T, V)
                largest = torch.maximum(largest, logits.abs().max())
                total, rows = total + logits.logsumexp(-1).sum(), rows + x.size
        sharding.split_again(self._model)
        found = {"max_logit": largest, "log_sum_exp": total / rows} | self._norms
        return {name: value.item() for name, value in found.items()}
