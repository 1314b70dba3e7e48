"""The training loop: warm-up, cosine, clipping, the best state on held-out samples, checkpoints.

Deterministic on a processor: the same samples, seed and number of threads give the same weights, also where the loop
was killed and taken up again. A state is kept only if it is better than the start on held-out samples.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onnxcompress.atomic import replacing
from onnxcompress.base import Progress
from onnxcompress.data import Batch
from onnxcompress.errors import DataError
from onnxcompress.executor.distributed import Processes
from onnxcompress.executor.losses import Objective
from onnxcompress.executor.network import Network
from onnxcompress.executor.optimizers import OptimizerName, make_optimizer
from onnxcompress.executor.samples import Shuffled, augment
from onnxcompress.executor.spec import as_tensor

__all__ = ["CHANCE", "Evaluation", "Outcome", "Settings", "Trainer", "deterministic", "read_checkpoint", "surely"]

Array = NDArray[Any]
Teacher = Callable[[Mapping[str, Array]], Mapping[str, Array]]

#: standard errors by which a state must beat the start: few held-out samples let chance win otherwise. A gain of one
#: is worth more than it risks; with two, 500 steps that gained a point of accuracy were thrown away
SURE = 1.0
#: standard errors by which the agreement may be lower than at the start: that much is chance
CHANCE = 1.0
#: seconds between two checkpoints
_CHECKPOINT_SECONDS = 20.0
#: steps of warm-up, unless that were more than half of all: the first steps of Adam are as large as its rate allows
_LEAST_WARMUP = 50
#: times the planned seconds after which training is cut short
_PATIENCE = 1.3


@dataclass(frozen=True)
class Settings:
    """How to train; see the fields of :class:`~onnxcompress.passes.distill.Distill`."""

    steps: int
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup: float = 0.1
    clip: float = 1.0
    average: float = 0.99
    seed: int = 0
    evaluations: int = 20
    images: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    #: how often each held-out sample is there, changed in other ways; all of them once, then all again
    copies: int = 1
    #: stop there, though the schedule is longer
    stop_after: int | None = None
    #: how long it should take, where that matters
    seconds: float | None = None

    def rate(self, step: int) -> float:
        """Learning rate of a step as a share of the full one: linear warm-up, then half a cosine down to nothing."""
        warm = min(max(round(self.warmup * self.steps), _LEAST_WARMUP if self.warmup else 0), self.steps // 2)
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def is_due(self, done: int) -> bool:
        """True where the state after ``done`` steps is to be judged."""
        every = max(1, self.steps // self.evaluations)
        return done == self.steps or done % every == 0


@dataclass(frozen=True)
class Evaluation:
    """How a state does on held-out samples: the loss of its outputs, and the agreement with the teacher, 0 to 1."""

    step: int
    loss: float
    agreement: float
    #: mean of the training loss since the last one
    training: float | None = None
    #: how much lower the loss is than at the start, in standard errors of the paired difference
    gain: float = 0.0
    #: how much lower the agreement is than at the start, in standard errors
    lost: float = 0.0

    def better_than(self, other: Evaluation) -> bool:
        """True where the loss is lower, and surely lower than at the start, and the agreement not below that."""
        return self.loss < other.loss and self.gain >= SURE and self.lost <= CHANCE


@dataclass
class Outcome:
    """The best state, how it does, and the way there."""

    start: Evaluation
    best: Evaluation
    curve: list[Evaluation] = field(default_factory=list)
    seconds: float = 0.0
    steps: int = 0
    #: True where the loss was not a number any more
    diverged: bool = False

    @property
    def improved(self) -> bool:
        """False where the start was never beaten."""
        return self.best.step > 0


def _description(outcome: Outcome, now: Evaluation) -> str:
    """For the progress bar."""
    figures = f"{100 * outcome.start.agreement:.2f} % -> {100 * now.agreement:.2f} %"
    return f"distilling, agreement {figures}, loss {outcome.start.loss:.3g} -> {now.loss:.3g}"


@contextmanager
def deterministic(threads: int, device: Any) -> Iterator[None]:
    """A context in which torch repeats its results; its settings are restored afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    if threads:
        torch.set_num_threads(threads)
    if torch.device(device).type == "cpu":
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def surely(before: Array, after: Array) -> float:
    """How much lower ``after`` is than ``before``, both [samples], in standard errors of the mean difference."""
    difference = before - after
    mean = float(difference.mean())
    if len(difference) < 2 or not math.isfinite(mean):
        return 0.0
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
    return mean / error if error > 0 else 0.0


class Trainer:
    """Trains a network to do what a teacher does.

    Args:
        network: the student; it holds the best state afterwards.
        objective: the loss.
        teacher: feeds in, the tensors that the objective asks for out.
        data: training batches.
        held_out: batches to judge by.
        settings: how to train.
        processes: those that share the work.
        checkpoint: a file to take up from and to write to, and a text that says what it belongs to.
        progress: where progress is shown.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        teacher: Teacher,
        data: Shuffled,
        held_out: Sequence[Batch],
        settings: Settings,
        processes: Processes,
        progress: Progress,
        checkpoint: tuple[Path, str] | None = None,
    ) -> None:
        self._network = network
        self._objective = objective
        self._teacher = teacher
        self._data = data
        self._settings = settings
        self._processes = processes
        self._progress = progress
        self._checkpoint = checkpoint
        self._parameters = [item.parameter for item in network.trained]
        self._optimizer = self._make_optimizer()
        judged = {target.teacher for target in objective.outputs}  # block outputs of all samples would be too much
        self._held = [(b.feeds, {n: v for n, v in self._answers(b.feeds).items() if n in judged}) for b in held_out]
        #: losses and agreements of the start, sample by sample
        self._start: tuple[Array, Array] = np.empty(0), np.empty(0)
        self._average = [p.detach().clone() for p in self._parameters] if settings.average else []

    def _make_optimizer(self) -> torch.optim.Optimizer:
        s = self._settings
        return make_optimizer(s.optimizer, self._network.trained, s.learning_rate, s.weight_decay)

    def _answers(self, feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        device = self._network.device
        return {name: as_tensor(value).to(device) for name, value in self._teacher(feeds).items()}

    # -- the learning rate -----------------------------------------------------------------------------------------

    def trial(self, rate: float, steps: int) -> float:
        """Mean training loss at the end of a short training of its own; the network is as before afterwards.

        It is the loss on batches that are the same for every rate, not that on held-out samples: those may have taken
        part in making the student, and would vote for leaving it as it is.
        """
        start = [p.detach().clone() for p in self._parameters]
        kept = self._settings, self._optimizer, self._average
        self._settings = replace(self._settings, steps=steps, learning_rate=rate)
        self._optimizer, self._average = self._make_optimizer(), []
        losses = []
        for step, batch in zip(range(steps), self._data.batches(), strict=False):
            losses.append(self._step(self._network, batch, step))
            if not math.isfinite(losses[-1]):
                break
        self._settings, self._optimizer, self._average = kept
        self._put(start)
        mean = float(np.mean(losses[-max(1, steps // 3) :]))
        return mean if math.isfinite(mean) and len(losses) == steps else math.inf

    # -- one step ---------------------------------------------------------------------------------------------------

    def step_loss(self, model: Any, batch: Batch, step: int) -> Tensor:
        """The loss of step number ``step``, this process's share of the batch."""
        s = self._settings
        feeds = augment(batch.feeds, s.images, s.changes, np.random.default_rng([s.seed, 1, step]))
        mine = self._processes.share(Batch(feeds, batch.labels, batch.samples))
        found = model(self._network.feeds(mine.feeds))
        labels = None
        if mine.labels is not None and self._objective.label_weight:
            labels = torch.from_numpy(np.array(mine.labels)).to(self._network.device)
        return self._objective.loss(found, self._answers(mine.feeds), labels)

    def seconds_a_step(self) -> float:
        """What a step takes, measured; nothing is changed."""
        batches = self._data.batches()
        times = []
        for number in range(4):
            batch = next(batches)
            start = time.perf_counter()
            self.step_loss(self._network, batch, number).backward()
            times.append(time.perf_counter() - start)
        for parameter in self._parameters:
            parameter.grad = None
        return float(np.median(times[1:]))

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train, and leave the best state in the network."""
        begun = time.perf_counter()
        start = self.evaluate(0)
        first, outcome, best = self._resumed()
        if outcome is None:
            outcome, first = Outcome(start, start, [start]), 0
        best = best if best is not None else [p.detach().clone() for p in self._parameters]
        s = self._settings
        model = self._processes.wrapped(self._network)
        losses: list[float] = []
        saved = time.monotonic()
        steps = range(first, s.steps)
        tracked = self._progress.track(steps, _description(outcome, outcome.best), len(steps))
        for step, batch in zip(tracked, self._data.batches(first), strict=False):
            if self._is_over(step, begun):
                break
            losses.append(self._step(model, batch, step))
            if not math.isfinite(losses[-1]):
                outcome.diverged = True
                break
            if s.is_due(step + 1):
                found = self.evaluate(step + 1, float(np.mean(losses)))
                losses = []
                outcome.curve.append(found)
                if found.better_than(outcome.best):
                    outcome.best = found
                    best = self._state()
                describe = getattr(self._progress, "describe", None)
                if describe is not None:
                    describe(_description(outcome, found))
                if self._checkpoint and (time.monotonic() - saved > _CHECKPOINT_SECONDS or step + 1 == s.steps):
                    self._save(step + 1, outcome, best)
                    saved = time.monotonic()
            outcome.steps = step + 1
        if outcome.curve[-1].step != outcome.steps and losses and not outcome.diverged:  # cut short
            found = self.evaluate(outcome.steps, float(np.mean(losses)))
            outcome.curve.append(found)
            if found.better_than(outcome.best):
                outcome.best, best = found, self._state()
        with torch.no_grad():
            for parameter, value in zip(self._parameters, best, strict=True):
                parameter.copy_(value)
        outcome.seconds += time.perf_counter() - begun
        return outcome

    def _is_over(self, step: int, begun: float) -> bool:
        """True where the schedule is cut short: as a saved recipe says, or because the machine got slower."""
        s = self._settings
        if s.stop_after is not None:
            return step >= s.stop_after
        late = s.seconds is not None and time.perf_counter() - begun > _PATIENCE * s.seconds
        return late and self._processes.size == 1

    def _step(self, model: Any, batch: Batch, step: int) -> float:
        s = self._settings
        for group in self._optimizer.param_groups:
            group["lr"] = s.learning_rate * s.rate(step) * group.get("scale", 1.0)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self.step_loss(model, batch, step)
        loss.backward()
        if s.clip:
            torch.nn.utils.clip_grad_norm_(self._parameters, s.clip)
        self._optimizer.step()
        if self._average:
            with torch.no_grad():
                decay = min(s.average, (step + 1) / (step + 10))
                for mean, parameter in zip(self._average, self._parameters, strict=True):
                    mean.lerp_(parameter, 1 - decay)
        return float(loss.detach())

    def _state(self) -> list[Tensor]:
        """The state that is judged: the parameters, or their running average."""
        return [v.detach().clone() for v in (self._average or self._parameters)]

    def evaluate(self, step: int, training: float | None = None) -> Evaluation:
        """Judge the state on the held-out samples; every process judges for itself."""
        own = [p.detach().clone() for p in self._parameters] if self._average and step else None
        if own is not None:
            self._put(self._average)
        losses: list[Tensor] = []
        agreements: list[Tensor] = []
        with torch.no_grad():
            for feeds, wanted in self._held:
                found = self._network(self._network.feeds(feeds))
                agreements.append(self._objective.agreement(found, wanted).double().cpu())
                losses.append(self._objective.sample_losses(found, wanted).double().cpu())
        if own is not None:
            self._put(own)
        if not losses:
            raise DataError("there are no held-out samples to judge by; give more samples")
        copies = self._settings.copies  # those of one sample are no more evidence than one
        loss, agreement = (torch.cat(found).numpy().reshape(copies, -1).mean(0) for found in (losses, agreements))
        if not step:
            self._start = loss, agreement
        gain, lost = surely(self._start[0], loss), surely(self._start[1], agreement)
        return Evaluation(step, float(loss.mean()), float(agreement.mean()), training, gain, lost)

    def _put(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, values, strict=True):
                parameter.copy_(value)

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _save(self, step: int, outcome: Outcome, best: Sequence[Tensor]) -> None:
        """Write everything that the rest depends on, in one atomic step; plain arrays, nothing pickled."""
        if self._checkpoint is None or self._processes.rank:
            return
        path, key = self._checkpoint
        arrays: dict[str, Array] = {}
        for i, parameter in enumerate(self._parameters):
            arrays[f"parameter.{i}"] = parameter.detach().cpu().contiguous().numpy()
            arrays[f"best.{i}"] = best[i].detach().cpu().contiguous().numpy()
            if self._average:
                arrays[f"average.{i}"] = self._average[i].cpu().contiguous().numpy()
            for name, value in self._optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    arrays[f"optimizer.{i}.{name}"] = value.detach().cpu().contiguous().numpy()
        curve = [[e.step, e.loss, e.agreement, e.training, e.gain, e.lost] for e in outcome.curve]
        about = {"key": key, "step": step, "best": outcome.best.step, "curve": curve, "steps": self._settings.steps}
        about["learning_rate"] = self._settings.learning_rate
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        with replacing(path) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _resumed(self) -> tuple[int, Outcome | None, list[Tensor] | None]:
        """(steps done, the way so far, the best state) from the checkpoint, or nothing where there is none."""
        about = read_checkpoint(self._checkpoint)
        if about is None or self._checkpoint is None or about["steps"] != self._settings.steps:
            return 0, None, None
        curve = [Evaluation(int(step), *figures) for step, *figures in about["curve"]]
        best: list[Tensor] = []
        with np.load(self._checkpoint[0], allow_pickle=False) as stored, torch.no_grad():
            for i, parameter in enumerate(self._parameters):
                parameter.copy_(torch.from_numpy(stored[f"parameter.{i}"]))
                best.append(torch.empty_like(parameter).copy_(torch.from_numpy(stored[f"best.{i}"])).detach())
                if self._average:
                    self._average[i].copy_(torch.from_numpy(stored[f"average.{i}"]))
                names = [n for n in stored.files if n.startswith(f"optimizer.{i}.")]
                for name in names:
                    value = torch.from_numpy(stored[name])
                    like = torch.empty_like(parameter).detach() if value.ndim else None
                    key = name.rsplit(".", 1)[1]
                    self._optimizer.state[parameter][key] = value if like is None else like.copy_(value)
        top = next(e for e in curve if e.step == about["best"])
        return int(about["step"]), Outcome(curve[0], top, curve, steps=int(about["step"])), best


def read_checkpoint(checkpoint: tuple[Path, str] | None) -> dict[str, Any] | None:
    """What a checkpoint says about itself; None where there is none that belongs to this run."""
    if checkpoint is None or not checkpoint[0].is_file():
        return None
    path, key = checkpoint
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            about: dict[str, Any] = json.loads(stored["about"].tobytes().decode())
        if not isinstance(about, dict):
            raise ValueError("no mapping")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, EOFError, BadZipFile, zlib.error) as error:
        raise DataError(f"{path}: is no checkpoint of a distillation; delete it or name another file") from error
    if about.get("key") != key:
        raise DataError(
            f"{path}: the checkpoint belongs to another student, teacher, data or recipe; delete it or name another"
        )
    return about
