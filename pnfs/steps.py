"""One optimiser step: forward, loss, backward, gradient exchange, Adam; bad ones are undone.

Everything that a step changes lives here (weights, running statistics, optimiser, loss scale), so a
step whose loss or gradient is not finite leaves all of it as it was. From the images to the updated
weights nothing waits for the device: on a GPU that part is replayed as one CUDA graph (`capture`).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pnfs import distributed
from pnfs.capture import Captured, recorder_for
from pnfs.checkpoint import load_optimizer
from pnfs.config import Config
from pnfs.data import Batch
from pnfs.head import pose_loss
from pnfs.kernels.triton import tuning
from pnfs.running import left_alone
from pnfs.search import StepContext, Strategy, decay_gradients

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PoseLoss(nn.Module):
    """The model together with its loss: what DistributedDataParallel wraps, so that a loss that
    never builds score maps goes through it as well."""

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model = model
        self.sigma = sigma

    def forward(self, images: Tensor, joints: Tensor, weights: Tensor) -> Tensor:
        return pose_loss(self.model, images, joints, weights, sigma=self.sigma)


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: mean over the batches of all processes; may be NaN or infinite.
        taken: false if nothing was updated, because loss or gradient was not finite.
        images: of all processes.
        data_seconds: waiting for batches and copying them to the device, whether before the step
            or, ahead, beside it.
        compute_seconds: everything else.
    """

    loss: float
    taken: bool
    images: int
    data_seconds: float
    compute_seconds: float


@dataclass
class Clock:
    """Sums over steps since the last row of metrics.jsonl."""

    data: float = 0.0
    compute: float = 0.0
    images: int = 0

    def add(self, result: StepResult) -> None:
        self.data += result.data_seconds
        self.compute += result.compute_seconds
        self.images += result.images

    def rates(self) -> dict[str, float]:
        """Throughput, and data time apart from compute time."""
        total = self.data + self.compute
        return {
            "images_per_second": round(self.images / total, 2) if total else 0.0,
            "data_seconds": round(self.data, 4),
            "compute_seconds": round(self.compute, 4),
        }


class Stepper:
    """Model, optimiser and loss scale of one process."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        strategy: Strategy,
        device: torch.device,
        *,
        fresh: bool = True,
    ) -> None:
        """Calls `strategy.prepare` with `fresh`; the model must be on `device` already."""
        self.config, self.model, self.strategy, self.device = config, model, strategy, device
        groups = strategy.prepare(model, fresh=fresh)
        by_decay = (groups.weights, config.train.weight_decay), (groups.architecture, 0.0)
        self.optimizer = torch.optim.Adam(
            [{"params": params, "weight_decay": decay} for params, decay in by_decay if params],
            lr=config.train.lr,
            fused=True,
        )
        decay = config.search.weight_decay or 0.0
        self.optimizer.register_step_pre_hook(
            lambda *_: decay_gradients(groups.architecture, decay)
        )
        self._own_rates()
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.dtype = PRECISIONS[config.train.precision]
        self.image_settings: dict[str, Any] = {
            "size": config.model.input_size,
            "profile": config.data.profile,
            "dtype": self.dtype,
        }
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.loss_module: nn.Module = PoseLoss(model, config.data.sigma)
        # Running statistics as they were before a step: a non-finite batch must not leave its mark.
        self.buffers = list(model.buffers())
        self.buffers_before = [buffer.clone() for buffer in self.buffers]
        self.work = Captured(
            self._compute,
            recorder_for(device),
            refused=self._reason_against_capture(),
            after_failure=self._renew_scaler,
        )
        self._context: StepContext | None = None
        self._told: str | None = None

    def connect(self) -> None:
        """Exchange gradients (and BN statistics if asked) with the other processes from now on."""
        if distributed.world() == 1:
            return
        self._freeze_unused()
        synchronized = self.config.train.sync_batch_norm
        if synchronized:
            distributed.synchronize_batch_norm(self.model)
        self.loss_module = DistributedDataParallel(
            self.loss_module, broadcast_buffers=not synchronized, gradient_as_bucket_view=True
        )

    def _freeze_unused(self) -> None:
        """Take parameters that the loss does not depend on out of training.

        DistributedDataParallel waits for the gradient of every parameter, so the backward pass
        would never end with, say, a level of the pyramid that a cut fabric does not read.
        """
        keypoints = self.config.model.skeleton_table.num_keypoints
        images = torch.zeros(2, 3, *self.config.model.input_size, device=self.device)
        joints = torch.zeros(2, keypoints, 2, device=self.device)
        with left_alone():
            loss = self.loss_module(images, joints, torch.ones(2, keypoints, device=self.device))
        trained = [parameter for parameter in self.trained if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        for parameter, gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                parameter.requires_grad_(False)

    def _own_rates(self) -> None:
        """Learning rates where a CUDA graph can read them; elsewhere they stay numbers."""
        for group in self.optimizer.param_groups:
            group["capturable"] = self.device.type == "cuda"
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=self.device) if group["capturable"] else rate

    def _reason_against_capture(self) -> str | None:
        if not self.config.train.cuda_graph:
            return "train.cuda_graph is off"
        if distributed.world() > 1:
            return "several processes exchange gradients and statistics"
        if not self.strategy.capturable:
            return f"strategy {self.strategy.name} acts between backward pass and update"
        return None

    def _renew_scaler(self) -> None:
        """A recording that broke off leaves the old one in the middle of a step."""
        state = self.scaler.state_dict()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.scaler.is_enabled())
        if state:
            self.scaler.load_state_dict(state)

    def _lower_scale(self) -> None:
        """As GradScaler does after an overflow; for gradients that it has not seen."""
        if self.scaler.is_enabled():
            self.scaler.scale(torch.zeros((), device=self.device))  # its first call makes the scale
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())

    def news(self) -> str | None:
        """How steps run on a GPU, once when it is known and when it changes."""
        if self.work.recorder is None:
            return None
        state = "each step is one CUDA graph" if self.work.recordings else None
        if self.work.refused is not None:
            state = f"steps are launched kernel by kernel: {self.work.refused}"
        if state is None or state == self._told:
            return None
        self._told = state
        return state

    def state_dict(self) -> dict[str, Any]:
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            group["lr"] = float(group["lr"])
        kernels = tuning.choices()
        return {"optimizer": optimizer, "scaler": self.scaler.state_dict(), "kernels": kernels}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_optimizer(self.optimizer, state["optimizer"])
        self._own_rates()
        tuning.restore(state.get("kernels", {}))
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Images (N, 3, H, W), joints and weights of a batch that is on the device."""
        return batch.images(**self.image_settings), batch.joints, batch.weights

    def loss(self, images: Tensor, joints: Tensor, weights: Tensor, module: nn.Module) -> Tensor:
        """The training loss, with its graph; `module` is a `PoseLoss`, wrapped or not."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss: Tensor = module(images, joints, weights)
        return loss

    def gradients(
        self, batches: Sequence[Batch], parameters: Sequence[Tensor]
    ) -> list[Tensor | None]:
        """Gradients of the mean training loss over `batches` of all ranks; see `StepContext`.

        Batches are normalised with their own statistics; the running ones, which are for the
        weights' batches alone, stay as they are.
        """
        wrapped = isinstance(self.loss_module, DistributedDataParallel)
        module = cast(nn.Module, self.loss_module.module) if wrapped else self.loss_module
        scale = self.scaler.get_scale()  # 1 but for fp16
        flags = [parameter.requires_grad for parameter in parameters]
        sums: list[Tensor | None] = [None] * len(parameters)
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            for batch in batches:
                with left_alone():
                    loss = self.loss(*self.inputs(batch), module) * (scale / len(batches))
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
                sums = [
                    new if old is None else old if new is None else old + new
                    for old, new in zip(sums, found, strict=True)
                ]
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
        sums = [None if g is None else g / scale if scale != 1 else g.clone() for g in sums]
        distributed.average_over_ranks([g for g in sums if g is not None])
        return sums

    def step(
        self,
        batches: Iterable[Batch],
        count: int,
        *,
        index: int,
        total: int,
        learning_rate: float,
        architecture_rate: float | None = None,
        held: Callable[[], Batch] | None = None,
        ahead: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Take `count` batches of this process and make one step of the optimiser.

        Args:
            batches: an iterator; its last batch may be the `count`-th.
            index: steps before this one. total: of the run.
            architecture_rate: learning rate of α and β; default that of the weights.
            held: the next batch for α and β, where the strategy has people for them.
            ahead: called while the device computes the step; may prepare the next batches.
        """
        rate = learning_rate if architecture_rate is None else architecture_rate
        started = time.monotonic()
        source = iter(batches)
        taken_batches = [next(source).to(self.device) for _ in range(count)]
        waited = time.monotonic() - started
        self._set_rates(learning_rate, rate)

        def next_held() -> Batch:
            nonlocal waited
            assert held is not None
            asked = time.monotonic()
            batch = held().to(self.device)
            waited += time.monotonic() - asked
            return batch

        self._context = StepContext(
            index,
            total,
            learning_rate,
            rate,
            self.optimizer,
            taken_batches,
            next_held,
            self.gradients,
        )
        if self.strategy.before_step(self._context):
            inputs = [tensor for batch in taken_batches for tensor in self.inputs(batch)]
            (report,) = self.work(*inputs)
            launched = time.monotonic()
            ahead()
            waited += time.monotonic() - launched
            total_loss, images_of_all, taken = report.tolist()
            if not taken:
                torch._foreach_copy_(self.buffers, self.buffers_before)
                self.strategy.undo()
        else:
            self._lower_scale()
            images = float(sum(map(len, taken_batches)))
            (images_of_all,) = distributed.sum_over_ranks([images], self.device)
            total_loss, taken = math.nan, False
        self._context = None
        return StepResult(
            loss=total_loss / distributed.world(),
            taken=bool(taken),
            images=int(images_of_all),
            data_seconds=waited,
            compute_seconds=time.monotonic() - started - waited,
        )

    def _compute(self, *inputs: Tensor) -> tuple[Tensor]:
        """Images, joints and weights of each batch → one step, without waiting for the device.

        Returns:
            (3,) float64: loss and images, summed over the ranks; 1 if anything was updated, else 0,
            and then the running statistics are still to be put back. Ranks agree on all three.
        """
        torch._foreach_copy_(self.buffers_before, self.buffers)
        self.optimizer.zero_grad(set_to_none=True)
        batches = list(zip(inputs[::3], inputs[1::3], inputs[2::3], strict=True))
        loss = torch.zeros((), device=self.device)
        for i, batch in enumerate(batches):
            with self._exchange(last=i + 1 == len(batches)):
                part = self.loss(*batch, self.loss_module) / len(batches)
                self.scaler.scale(part).backward()
            loss += part.detach()
        images = sum(len(images) for images, _, _ in batches)
        sums = torch.stack([loss.double(), torch.full_like(loss, images, dtype=torch.float64)])
        distributed.add_over_ranks(sums)
        self.scaler.unscale_(self.optimizer)
        assert self._context is not None
        self.strategy.after_backward(self._context)
        norm = self._clip()
        taken = torch.isfinite(sums[0]) & torch.isfinite(norm)
        self.optimizer.found_inf = (~taken).float()  # type: ignore[attr-defined]  # it skips then
        self.optimizer.step()
        self.scaler.update()  # after an overflow of fp16 gradients this lowers the scale
        return (torch.cat([sums, taken.double()[None]]),)

    def _set_rates(self, weights: float, architecture: float) -> None:
        """α and β, the second group if there is one, stand still once their search is over."""
        stopped = self.strategy.stopped_at is not None
        rates = (weights, 0.0 if stopped else architecture)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def _exchange(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Gradients travel with the last of the accumulated batches only."""
        if isinstance(self.loss_module, DistributedDataParallel) and not last:
            return self.loss_module.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        """Scale the gradients to `train.grad_clip`, if there is one; returns the norm before."""
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.config.train.grad_clip
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.trained, limit, norm)
        return norm
