"""Distillation: the original teaches the compressed model on unlabelled samples, without its framework.

The student is the graph as it is, pruned, quantised or both; names and structure stay, weights get better. The teacher
runs on onnxruntime, the student on torch (:mod:`onnxcompress.executor`), which is first held against onnxruntime. The
loss compares outputs, and block outputs at the points where both networks compute the same thing. A part of the samples
is held out, and no pass of the recipe before this one sees it: what was fitted to samples looks better on them than it
is. The state that does best there, on changed copies where the samples are images, is kept, and only if it beats the
start as onnxruntime serves it.

The teacher answers alongside, and nothing that it said is kept: images are changed at random, so that no answer is
asked for twice, and block outputs of all samples are too much to keep (0.3 MB an image of a ResNet-20, 16 GB for
50,000). Its answers take about a fifth of the time of a step, and memory does not grow with the number of samples.

Block outputs lead: they tell every layer what to do, where outputs tell all of them together. In 600 steps the
divergence of a resnet20 at 0.75 on unseen training images fell from 0.0535 to 0.0469 where they weighed 1, and to
0.0368 where they weighed 256.

A network with folded BatchNormalization is fragile: the learning rate is relative to the size of each weight, is found
by short trials, and warms up. Matrices are trained by Muon, where its own work is small beside a step.

Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; L. Beyer et al., "Knowledge
distillation: A good teacher is patient and consistent", CVPR 2022, for showing both networks the same changed image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from onnxcompress.base import Change, Context, Decision, Detail, Guarantee, Pass, Refusal
from onnxcompress.data import Batch, Dataset
from onnxcompress.errors import DataError, ModelError, UsageError
from onnxcompress.executor import import_torch
from onnxcompress.graph import Graph, input_specs
from onnxcompress.io import load, model_files, model_sha256
from onnxcompress.proto import to_proto
from onnxcompress.quantization.rounding import integer_bounds
from onnxcompress.shapes import infer_shapes, node_macs
from onnxcompress.targets import get_target

if TYPE_CHECKING:
    from onnxcompress.executor.distributed import Processes
    from onnxcompress.executor.losses import Kind, Objective
    from onnxcompress.executor.network import Network, Trained
    from onnxcompress.executor.optimizers import OptimizerName
    from onnxcompress.executor.training import Outcome, Trainer
    from onnxcompress.session import Session

__all__ = ["Distill"]

Array = NDArray[Any]
Tensors = Mapping[str, Array]

#: agreement of the teacher with itself on an image and its changed copy from which the change is harmless
_HARMLESS = 0.85
#: most samples that are held out
_HELD_OUT = 1024
#: bytes that they may have, unless they were fewer than this
_HELD_OUT_BYTES = 1 << 28
_LEAST_HELD_OUT = 64
#: fewest samples, of half of them at most, that can tell a gain from chance
_FEWEST_HELD_OUT = 4
#: changed copies of each held-out image, where they are few
_COPIES = 8
#: how images are mixed that are seen more often than this (of resnet20 at half, 500 steps on 1,024 images, on others:
#: agreement 92.0 -> 92.8 without, 93.0 with mixup, 93.3 with cutmix)
_MIXED = ("cutmix",)
_OFTEN = 10
#: usual learning rates
_RATES = {"muon": 2e-3, "adamw": 1e-3, "sgd": 2e-3}
#: work of muon's own, as a share of that of a step, up to which it is worth it: the divergence above fell to 0.0368
#: with adamw, to 0.0326 with muon
_MOST_OWN_WORK = 0.3
#: what is tried of them, for how many steps each, and steps from which that is worth its time
_TRIED = (3.0, 1.0, 0.3, 0.1)
_TRIAL_STEPS = 40
_LEAST_FOR_TRIALS = 200
#: most steps that a budget of time is taken for
_MOST_STEPS = 1_000_000
#: samples that the executor is held against onnxruntime with
_CHECKED = 2


class Distill(Pass):
    """Train the weights so that the model answers what the original answers, on samples without labels."""

    name: ClassVar[str] = "distill"
    file_options: ClassVar[frozenset[str]] = frozenset({"checkpoint", "teacher"})

    teacher: str | None = Field(None, description="Model file to learn from; default: the input of the recipe")
    minutes: float = Field(6.0, gt=0, le=100_000, description="About how long to train, where steps are not given")
    steps: int | None = Field(None, ge=1, le=_MOST_STEPS, description="How many steps to train")
    stop_after: int | None = Field(None, ge=1, description="Stop there although the schedule is for more steps")
    batch_size: int = Field(64, ge=1, description="Samples a step, of all processes; fewer where shapes vary")
    optimizer: Literal["auto", "muon", "adamw", "sgd"] = Field(
        "auto", description="Optimizer; auto: muon where its work is small beside that of a step, else adamw"
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Learning rate; of muon and adamw relative to each weight's size. Default: by trial",
    )
    warmup: float = Field(0.1, ge=0, le=0.5, description="Share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.0, ge=0, le=1, description="Weight decay")
    clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0: no limit")
    average: float = Field(0.99, ge=0, lt=1, description="Decay of the running average of the weights that is judged")
    temperature: float = Field(4.0, gt=0, le=1000, description="Temperature of the softmax of class scores")
    output_weight: float = Field(1.0, ge=0, description="Weight of the divergence or the cosine of the outputs")
    value_weight: float = Field(1.0, ge=0, description="Weight of the squared error of the outputs")
    block_weight: float = Field(512.0, ge=0, description="Weight of the squared error of block outputs; 0: none")
    label_weight: float = Field(
        0.0, ge=0, description="Weight of the cross entropy with the labels, where there are any"
    )
    outputs: Literal["auto", "classes", "embedding", "values"] = Field(
        "auto", description="What the outputs hold; auto: judged by shape, values and name"
    )
    augment: tuple[str, ...] | None = Field(
        None,
        description="Changes of images: flip, crop, mixup, cutmix, none; default: flip and crop where the teacher does "
        "not mind, cutmix where images are few",
    )
    held_out: float = Field(
        0.1, gt=0, lt=1, description="Share of the samples held out to judge by, 4 to 1,024 of them"
    )
    checkpoint: str | None = Field(None, description="File to save the state to, and to take it up from")

    @field_validator("augment")
    @classmethod
    def _known_changes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        wrong = [v for v in value or () if v not in ("flip", "crop", "mixup", "cutmix", "none")]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no change of images; expected flip, crop, mixup, cutmix or none")
        return value

    @property
    def guarantee(self) -> Guarantee:
        """Changes weights, for the better: judged by the task metric."""
        return Guarantee.APPROXIMATE

    @property
    def needs_data(self) -> bool:
        """It learns from samples."""
        return True

    def requires(self, graph: Graph, context: Context) -> None:
        """There must be a teacher that is not the student."""
        if self.teacher is None and (context.original is None or context.original is graph):
            raise UsageError("distill learns from another model; name it with --teacher, or run distill in a recipe")

    def hold_out(self, data: Dataset, seed: int) -> tuple[Dataset, Dataset] | None:
        """(what is learned from, what is judged by); None where there are too few samples."""
        first = data.first()
        each = sum(value.nbytes for value in first.feeds.values()) / first.samples
        most = min(_HELD_OUT, max(_LEAST_HELD_OUT, int(_HELD_OUT_BYTES / max(each, 1))))
        try:
            share = max(self.held_out, min(_FEWEST_HELD_OUT / data.samples, 0.5))
            return data.split(min(share, most / data.samples), seed)
        except DataError:
            return None

    def check_available(self) -> None:
        """Torch, the teacher's file and the checkpoint's folder."""
        if self.teacher is not None:
            model_files(self.teacher)
        if self.checkpoint is not None and not Path(self.checkpoint).absolute().parent.is_dir():
            raise UsageError(f"the folder of the checkpoint {self.checkpoint!r} does not exist; create it first")
        import_torch()

    def models(self) -> tuple[str, ...]:
        """The teacher's file."""
        return () if self.teacher is None else (self.teacher,)

    def depends_on(self) -> str | None:
        """The contents of the teacher's files."""
        return None if self.teacher is None else model_sha256(self.teacher)

    def apply(self, graph: Graph, context: Context) -> Iterator[Change | Refusal | Decision | Detail]:
        """Check, train, and keep what beats the start."""
        teacher = load(self.teacher) if self.teacher is not None else context.original
        assert teacher is not None
        try:
            lesson = _Lesson(self, graph, teacher, context)
            try:
                trained = lesson.train()
            finally:
                lesson.leave()
        except ModelError as error:
            context.warn(f"nothing was distilled: {error}")
            yield Refusal("", f"not distilled: {error}")
            return
        yield from trained


@dataclass
class _Judgement:
    """Loss and agreement with the teacher on held-out samples, as onnxruntime serves the student."""

    loss: float
    #: [samples]
    agreements: Array
    sqnr_db: float

    @property
    def agreement(self) -> float:
        """Its mean."""
        return float(self.agreements.mean())


class _Lesson:
    """One distillation."""

    def __init__(self, options: Distill, graph: Graph, teacher: Graph, context: Context) -> None:
        import torch

        from onnxcompress.executor.check import check_network, open_session
        from onnxcompress.executor.distributed import join_processes
        from onnxcompress.executor.losses import block_points, kept_positions
        from onnxcompress.executor.network import pick_device

        assert context.data is not None
        self._options, self._graph, self._teacher, self._context = options, graph, teacher, context
        self._device = pick_device()
        self._processes: Processes = join_processes(self._device)
        _check_interfaces(graph, teacher)
        self._threads = context.threads or (torch.get_num_threads() if self._processes.size > 1 else 0)
        few = context.data.rebatch(_CHECKED).first()
        check_network(graph, few.feeds, device=self._device, threads=self._threads)
        self._train, self._held = self._split(context.data)
        points = block_points(graph, teacher) if options.block_weight else []
        self._before: Session = open_session(graph, points, optimization="disabled", threads=self._threads)
        names = [tensor.name for tensor in teacher.outputs]
        session = open_session(teacher, points, optimization="all", threads=self._threads)
        self._objective = self._make_objective(points, names, session, kept_positions(graph, context.kept))
        self._wanted = list(dict.fromkeys(t.teacher for t in (*self._objective.outputs, *self._objective.blocks)))
        if len(self._objective.blocks) < len(points):  # what nobody asks for need not be computed
            session = open_session(
                teacher, [t.teacher for t in self._objective.blocks], optimization="all", threads=self._threads
            )
        self._session = session
        self._images, self._changed = self._changes()
        self._samples = sum(batch.samples for batch in self._held)
        self._copies = 1
        self._held = self._moved()

    # -- what to learn from -----------------------------------------------------------------------------------------

    def _split(self, data: Dataset) -> tuple[Dataset, list[Batch]]:
        parts = self._options.hold_out(data, self._context.seed)
        if parts is None:
            self._context.warn("too few samples to hold any out; distillation was judged on what it learned from")
            parts = data, data
        return parts[0], list(parts[1])

    def _ask_teacher(self, feeds: Tensors) -> Tensors:
        return self._session.run(dict(feeds), self._wanted)

    def _make_objective(
        self,
        points: Sequence[str],
        names: Sequence[str],
        session: Session,
        kept: Mapping[str, Mapping[int, tuple[int, ...]]],
    ) -> Objective:
        from onnxcompress.executor.losses import Objective, Target, kind_of, matched

        options = self._options
        answers = [session.run(dict(batch.feeds)) for batch in self._held[:8]]
        mine = self._before.run(dict(self._held[0].feeds))
        outputs = []
        for own, name in zip((t.name for t in self._graph.outputs), names, strict=True):
            values = [answer[name] for answer in answers]
            if not isinstance(values[0], np.ndarray) or not isinstance(mine[own], np.ndarray):
                continue
            kind: Kind | None = kind_of(name, values[0])
            if kind is None or values[0].shape != mine[own].shape:
                continue
            if options.outputs != "auto":
                kind = "probabilities" if (options.outputs, kind) == ("classes", "probabilities") else options.outputs
            power = float(np.mean([np.mean(np.square(v.astype(np.float64))) for v in values]))
            if power > 0 and np.isfinite(power):
                outputs.append(Target(own, name, kind, power))
        if not outputs:
            raise ModelError("no output of the teacher is a tensor of real numbers that the student has, too")
        return Objective(
            outputs,
            matched(points, mine, answers[0], kept),
            options.temperature,
            options.output_weight,
            options.value_weight,
            options.block_weight,
            options.label_weight,
        )

    # -- the lesson -------------------------------------------------------------------------------------------------

    def train(self) -> list[Change | Refusal | Decision | Detail]:
        """Train, write the weights back, and judge; what there is to tell."""
        from onnxcompress.executor.training import CHANCE, deterministic, surely

        start = self._judge(self._graph)
        with deterministic(self._context.threads, self._device):
            outcome, network, settings = self._trained()
        untouched = [(item.constant, item.constant._values) for item in network.trained]
        changed = network.write_back() if outcome.improved else []
        end = self._judge(self._graph) if changed else start
        if changed and not (end.loss < start.loss and surely(start.agreements, end.agreements) <= CHANCE):
            for constant, values in untouched:  # half precision may lose what was won
                constant._values = values
            changed, end = [], start
        told: list[Change | Refusal | Decision | Detail] = [Decision("steps", settings.steps)]
        if outcome.steps < settings.steps and not outcome.diverged:
            told.append(Decision("stop_after", outcome.steps))
        told += [
            Decision("optimizer", settings.optimizer),
            Decision("learning_rate", settings.learning_rate),
            Decision("augment", list(settings.changes) or ["none"]),
            Detail("distillation", self._told(outcome, start, end, settings.changes)),
        ]
        if changed:
            text = (
                f"{len(changed)} weights, {outcome.steps} steps; on {self._samples} held-out samples "
                f"agreement {100 * start.agreement:.2f} -> {100 * end.agreement:.2f} %, "
                f"SQNR {start.sqnr_db:.2f} -> {end.sqnr_db:.2f} dB"
            )
            told.append(Change("distilled", "", text))
        else:
            told.append(Refusal("", "not distilled: no state does better than the start on held-out samples"))
        return told

    def leave(self) -> None:
        """Part from the processes that shared the work."""
        self._processes.leave()

    def _trained(self) -> tuple[Outcome, Network, Any]:
        from onnxcompress.executor.network import Network
        from onnxcompress.executor.samples import Shuffled
        from onnxcompress.executor.training import Settings, Trainer, read_checkpoint

        options, context = self._options, self._context
        targets = (*self._objective.outputs, *self._objective.blocks)
        network = Network(self._graph, list(dict.fromkeys(t.student for t in targets)), device=self._device)
        if not network.trained:
            raise ModelError("the student has no weight that could be trained")
        largest = get_target(context.target).weights.largest_pair
        if largest is not None:
            _bound_pairs(network, largest)
        shuffled = Shuffled(self._train, options.batch_size, context.seed)
        optimizer = options.optimizer if options.optimizer != "auto" else self._pick_optimizer(network.trained)
        settings = Settings(
            steps=options.steps or 1,
            optimizer=optimizer,
            learning_rate=options.learning_rate or _RATES[optimizer],
            weight_decay=options.weight_decay,
            warmup=options.warmup,
            clip=options.clip,
            average=options.average,
            seed=context.seed,
            images=tuple(self._images),
            changes=tuple(self._changed),
            copies=self._copies,
            stop_after=options.stop_after,
        )
        checkpoint = (Path(options.checkpoint), self._key()) if options.checkpoint is not None else None

        def trainer(settings: Settings) -> Trainer:
            return Trainer(
                network,
                self._objective,
                self._ask_teacher,
                shuffled,
                self._held,
                settings,
                self._processes,
                context.progress,
                checkpoint,
            )

        if options.steps is None:
            known = read_checkpoint(checkpoint)
            steps = known["steps"] if known is not None else self._affordable(trainer(settings))
            settings = replace(settings, steps=steps, seconds=60 * options.minutes)
        settings = replace(settings, changes=(*settings.changes, *self._mixing(settings.steps)))
        if options.learning_rate is None and settings.steps >= _LEAST_FOR_TRIALS:
            known = read_checkpoint(checkpoint)
            rate = known["learning_rate"] if known is not None else self._rate(trainer(settings), _RATES[optimizer])
            settings = replace(settings, learning_rate=rate)
        return trainer(settings).run(), network, settings

    def _mixing(self, steps: int) -> Sequence[str]:
        """Ways to mix images, where nobody says otherwise and images are so few that they would be learned by heart.

        A teacher has an answer for any image, so what it says to a mixed one is worth learning, too.
        """
        options = self._options
        if options.augment is not None or not self._images or (options.label_weight and self._train.has_labels):
            return ()
        return _MIXED if steps * options.batch_size >= _OFTEN * self._train.samples else ()

    def _pick_optimizer(self, trained: Sequence[Trained]) -> OptimizerName:
        """Muon where making its matrices orthogonal costs little beside a step, which is three forward passes."""
        from onnxcompress.executor.optimizers import orthogonal_macs

        batch = self._held[0]
        share = min(self._options.batch_size, self._train.samples) / batch.samples
        types = infer_shapes(self._graph, {name: value.shape for name, value in batch.feeds.items()})
        step = 3 * share * sum(node_macs(self._graph, types).values())
        own = orthogonal_macs(trained)
        return "muon" if 0 < own <= _MOST_OWN_WORK * step else "adamw"

    def _rate(self, trainer: Trainer, usual: float) -> float:
        """The learning rate with the lowest loss after a short training."""
        rates = [usual * factor for factor in _TRIED]
        found = {
            rate: self._processes.agreed(trainer.trial(rate, _TRIAL_STEPS))
            for rate in self._context.progress.track(rates, "trying learning rates", len(rates))
        }
        return min(rates, key=lambda rate: found[rate])

    def _affordable(self, trainer: Trainer) -> int:
        """How many steps fit into the time; a tenth of it is for judging."""
        seconds = self._processes.agreed(trainer.seconds_a_step())
        steps = int(0.9 * 60 * self._options.minutes / seconds)
        if self._options.learning_rate is None and steps >= _LEAST_FOR_TRIALS + _TRIAL_STEPS * len(_TRIED):
            steps -= _TRIAL_STEPS * len(_TRIED)
        return max(1, min(_MOST_STEPS, steps))

    def _changes(self) -> tuple[list[str], list[str]]:
        """(inputs that are images, changes to make): those asked for, or those that the teacher does not mind."""
        import torch

        from onnxcompress.executor.samples import augment, image_inputs

        images = image_inputs(input_specs(self._graph), self._held[0].feeds)
        asked = self._options.augment
        if asked is not None or not images:
            return images, [] if asked is None or "none" in asked else sorted(asked)
        changes = []
        for change in ("crop", "flip"):
            generator = np.random.default_rng([self._context.seed, 2])
            agreement, count = 0.0, 0
            for batch in self._held[:16]:
                moved = augment(batch.feeds, images, (change,), generator)
                pair = [
                    {t.student: torch.from_numpy(np.array(answer[t.teacher])) for t in self._objective.outputs}
                    for answer in (self._ask_teacher(moved), self._ask_teacher(batch.feeds))
                ]
                theirs = {t.teacher: pair[1][t.student] for t in self._objective.outputs}
                each = self._objective.agreement(pair[0], theirs)
                agreement, count = agreement + float(each.sum()), count + len(each)
            if agreement >= _HARMLESS * count:
                changes.append(change)
        return images, changes

    def _moved(self) -> list[Batch]:
        """What is judged by: of images that may be changed, changed copies of the held-out ones.

        Whatever made the student may have been fitted to the samples themselves, and does better on them than it is.
        """
        from onnxcompress.executor.samples import MIXING, augment

        changes = [change for change in self._changed if change not in MIXING]
        if not self._images or not changes:
            return self._held
        size = sum(value.nbytes for batch in self._held for value in batch.feeds.values())
        self._copies = max(1, min(_COPIES, 2 * _HELD_OUT // self._samples, int(_HELD_OUT_BYTES / max(size, 1))))
        generator = np.random.default_rng([self._context.seed, 3])
        return [
            Batch(augment(batch.feeds, self._images, changes, generator), batch.labels, batch.samples)
            for _ in range(self._copies)
            for batch in self._held
        ]

    def _key(self) -> str:
        """What a checkpoint belongs to."""
        assert self._context.data is not None
        digest = hashlib.sha256(b"2")  # layout of the checkpoint
        for graph in (self._graph, self._teacher):
            digest.update(to_proto(graph).SerializeToString(deterministic=True))
        digest.update(self._context.data.fingerprint().encode())
        options = self._options.model_dump(
            mode="json", exclude={"checkpoint", "teacher", "minutes", "steps", "stop_after"}
        )
        digest.update(repr((sorted(options.items()), self._context.seed, self._context.target)).encode())
        return digest.hexdigest()

    # -- judging ----------------------------------------------------------------------------------------------------

    def _judge(self, graph: Graph) -> _Judgement:
        import torch

        from onnxcompress.executor.spec import as_tensor
        from onnxcompress.session import Session

        session = Session(graph, optimization="disabled", threads=self._threads)
        loss, count, error, signal = 0.0, 0, 0.0, 0.0
        agreements: list[Array] = []
        with torch.no_grad():
            for batch in self._held:
                found = session.run(dict(batch.feeds))
                wanted = self._ask_teacher(batch.feeds)
                a = {t.student: as_tensor(found[t.student]) for t in self._objective.outputs}
                b = {t.teacher: as_tensor(wanted[t.teacher]) for t in self._objective.outputs}
                each = self._objective.agreement(a, b)
                loss, count = loss + float(self._objective.output_loss(a, b)) * len(each), count + len(each)
                agreements.append(each.double().numpy())
                for target in self._objective.outputs:
                    theirs = b[target.teacher].double()
                    error += float((a[target.student].double() - theirs).square().sum()) / target.power
                    signal += float(theirs.square().sum()) / target.power
        decibels = 10 * np.log10(signal / error) if error > 0 else float("inf")
        each_sample = np.concatenate(agreements).reshape(self._copies, -1).mean(0)
        return _Judgement(loss / count, each_sample, float(decibels))

    def _told(self, outcome: Outcome, start: _Judgement, end: _Judgement, changes: Sequence[str]) -> dict[str, Any]:
        """For the report; plain numbers."""
        return {
            "outputs": {t.student: t.kind for t in self._objective.outputs},
            "blocks": [t.student for t in self._objective.blocks],
            "augment": list(changes),
            "samples": {"train": self._train.samples, "held_out": self._samples},
            "steps": outcome.steps,
            "best_step": outcome.best.step,
            "seconds": round(outcome.seconds, 1),
            "device": str(self._device),
            "processes": self._processes.size,
            "agreement": {"before": start.agreement, "after": end.agreement},
            "loss": {"before": start.loss, "after": end.loss},
            "sqnr_db": {"before": _finite(start.sqnr_db), "after": _finite(end.sqnr_db)},
            "curve": [
                {"step": e.step, "training_loss": e.training, "loss": e.loss, "agreement": e.agreement}
                for e in outcome.curve
            ],
        }


def _finite(value: float) -> float | None:
    return round(value, 3) if np.isfinite(value) else None


def _check_interfaces(student: Graph, teacher: Graph) -> None:
    """Both must take the same inputs and have as many outputs.

    Raises:
        UsageError: they do not.
    """
    missing = [t.name for t in teacher.inputs if t.name not in {s.name for s in student.inputs}]
    if missing:
        raise UsageError(f"the teacher takes an input {missing[0]!r} that the student lacks; give a model of one kind")
    if len(student.outputs) != len(teacher.outputs):
        raise UsageError(
            f"the student has {len(student.outputs)} outputs and the teacher {len(teacher.outputs)}; give a model of "
            "one kind"
        )


def _bound_pairs(network: Network, largest: int) -> None:
    """Keep integer weights such that no two of a filter saturate, as they are (see the target ``x86-any``)."""
    for item in network.trained:
        if item.master is None or item.master.start.dtype != np.int8 or item.master.start.ndim < 2:
            continue
        start = item.master.start.astype(np.float64)
        axis = next((a for a, size in enumerate(item.master.scale.shape) if size > 1), 0)
        rows = np.moveaxis(start, axis, 0)
        low, high = integer_bounds(rows.reshape(len(rows), -1), largest)
        bounds = (np.moveaxis(bound.reshape(rows.shape), 0, axis) for bound in (low, high))
        item.master.bound(*bounds)
