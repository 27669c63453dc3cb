"""The finish of a quantized model, from its float model's predictions to what is kept: `finish_model`."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gptq_plugin import distributed
from gptq_plugin.calibration.sampling import share_of
from gptq_plugin.device.memory import Peak, give_back, peak_bytes
from gptq_plugin.errors import CalibrationError
from gptq_plugin.finish.block_walk import BlockWalk, walk_blocks
from gptq_plugin.finish.chain import Chain
from gptq_plugin.finish.descent import apart_from_other_numbers, draw_as_before, mean_over_ranks
from gptq_plugin.finish.interruption import Interruption
from gptq_plugin.finish.logits import LogitReader
from gptq_plugin.finish.options import Finish
from gptq_plugin.finish.rows import Rows
from gptq_plugin.finish.student import Student
from gptq_plugin.finish.surroundings import Surroundings, Teacher
from gptq_plugin.finish.teacher import Lesson, ask_teacher
from gptq_plugin.finish.train import Training
from gptq_plugin.memory.streamed_to import streamed_to
from gptq_plugin.report.finish_record import BlockRecord, FinishRecord, Judgement

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finished:
    """A finish that was made.

    Attributes:
        record: For the report.
        deviations: Differences from the request, a sentence each.
        undo: Gives the model back what GPTQ gave it; nothing happens if that was kept.
    """

    record: FinishRecord
    deviations: list[str]
    undo: Callable[[], None]


def finish_model(
    model: nn.Module, teacher: Teacher, rows: Rows, options: Finish, surroundings: Surroundings
) -> Finished:
    """Trains a quantized model towards a float one, and gives it the result if that is better on held-out samples.

    In a process group every rank calls it, with the same models and its own rows; all get the same result.

    Args:
        model: With `QuantLinear` layers, in evaluation mode.
        teacher: The float model.
        rows: The samples.
        options: How to train.
        surroundings: Where.

    Raises:
        TargetError, CalibrationError: As `ask_teacher`, `Student.of` and `Chain`; or the models predict other numbers
            of classes, or no position to train or to judge on counts. The model is as it was.
    """
    started = time.perf_counter()
    chain = Chain.of(model) if options.by_blocks else None
    head = LogitReader(model).head
    with teacher("") as float_model, streamed_to(float_model, surroundings.where):
        asked = surroundings.run, surroundings.token_weighting, options.top_logits, head
        lessons, told = ask_teacher(float_model, rows, *asked, chain, share_of(options.block_nsamples))
    _refuse_uncounted(rows, lessons, surroundings.token_weighting)
    give_back(surroundings.device)
    Peak(surroundings.device)  # measured anew
    work = _Work(model, teacher, rows, lessons, options, surroundings)
    with contextlib.ExitStack() as undo:
        undo.callback(work.undo)
        with Interruption() as interruption:
            work.do(chain, interruption)
        undo.pop_all()
    record = work.record(time.perf_counter() - started)
    _log(record.summary())
    told = [one for of_rank in distributed.gather_objects(told) for one in of_rank]
    deviations = [*told, *(f"finish: {one}" for one in rows.deviations), *_over_memory(surroundings)]
    return Finished(record, list(dict.fromkeys(deviations)), work.undo)


@dataclass
class _Work:
    """A finish under way. `changes` undo it, the last one first; `divergences` are those of held-out samples, of what
    GPTQ gave and behind each change that was tried."""

    model: nn.Module
    teacher: Teacher
    rows: Rows
    lessons: Sequence[Lesson]
    options: Finish
    surroundings: Surroundings
    changes: list[Callable[[], None]] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    blocks: list[BlockRecord] = field(default_factory=list)
    curve: Sequence[Judgement] = ()
    best_step: int = 0
    steps: int = 0
    tokens: int = 0

    @property
    def held_out(self) -> dict[int, Lesson]:
        return dict(zip(self.rows.numbers, self.lessons[len(self.rows.train) :], strict=True))

    def undo(self) -> None:
        while self.changes:
            self.changes.pop()()

    def do(self, chain: Chain | None, interruption: Interruption) -> None:
        """Makes all steps, and keeps what is better."""
        self.divergences.append(self._judged())
        wanted: Mapping[str, Tensor] = {}
        if chain is not None:
            walk = self._walk(chain, interruption)
            if not self._keeps(walk.undo):
                self.notes.append("what training the blocks gave was no better, and was undone")
            else:
                wanted = walk.wanted
            if walk.interrupted:
                self.notes.append(f"interrupted in {self.blocks[-1].name}")
                return
        self._train(wanted, interruption)

    def _walk(self, chain: Chain, interruption: Interruption) -> BlockWalk:
        passages = [one.passage for one in self.lessons if one.passage is not None]
        chain.agree()
        if passages:
            self._compare(chain)
        names, steps = len(chain.names), self.options.block_steps
        _log(f"finish ({self.options.kind}): {self.rows.samples} samples, {names} blocks of at most {steps} steps each")
        walk = walk_blocks(
            self.model, self.teacher, chain, passages, self.rows.numbers, self.options, self.surroundings,
            interruption, lambda done, one: self._tell(done, names * steps, f"block error {one.held_out:.3g}"),
        )  # fmt: skip
        self.blocks, self.tokens = walk.records, walk.tokens
        return walk

    def _compare(self, chain: Chain) -> None:
        """Refuses models whose blocks are no chain, by the first batch that has a passage."""
        lesson, passage = next((one, one.passage) for one in self.lessons if one.passage is not None)
        with torch.no_grad(), streamed_to(self.model, self.surroundings.where), chain.watching(self.model):
            self.surroundings.run(self.model, lesson.data)
            chain.check_same(passage, chain.take())

    def _train(self, wanted: Mapping[str, Tensor], interruption: Interruption) -> None:
        """Trains the model as a whole; codes begin at weights that trained blocks have."""
        options, device = self.options, self.surroundings.device
        norms, codes = options.trains_norms, options.kind == "full"
        with Student.of(self.model, device, norms=norms, codes=codes) as student:
            for name, layer in student.latent_layers.items():
                if name in wanted:
                    layer.begin_at(wanted[name])
            trained = self.lessons[: len(self.rows.train)]
            training = Training(self.model, student, self.surroundings, trained, self.held_out, options)
            _log(f"finish ({options.kind}): {self.rows.samples} samples to train on, at most {options.steps} steps")

            def tell(steps: int, one: Judgement) -> None:
                text = f"finish: after {steps} of {options.steps} steps, KL to the float model {one.held_out:.5g}"
                _log(f"{text} held out")
                self._tell(steps, options.steps, f"KL {one.held_out:.4g}")

            student.set_values(training.train(tell, interruption))
            outcome = student.outcome()
        self.curve, self.steps = training.curve, training.steps
        self.tokens += training.tokens
        self.notes.insert(0, training.ended)
        if training.best.step > 0 and self._keeps(outcome.give(self.model)):
            self.best_step = training.best.step

    def _keeps(self, undo: Callable[[], None]) -> bool:
        """Judges the model behind a change, which is undone unless that is better than all before."""
        self.changes.append(undo)
        found = self._judged()
        is_better = math.isfinite(found) and found < min(filter(math.isfinite, self.divergences), default=math.inf)
        self.divergences.append(found)
        if not is_better:
            self.changes.pop()()
        return is_better

    def _judged(self) -> float:
        """The divergence of the model as it is from the float one, on the held-out samples."""
        where, device = self.surroundings.where, self.surroundings.device
        reader, sums = LogitReader(self.model), {}
        with torch.no_grad(), streamed_to(self.model, where), reader.watching(), apart_from_other_numbers(device):
            for number, lesson in self.held_out.items():
                draw_as_before(device)
                logits = lesson.counted(
                    reader.read(
                        lambda: self.surroundings.run(self.model, lesson.data),  # noqa: B023
                        "a batch of the finish",
                        finite=not self.divergences,
                    )
                )
                sums[number] = (lesson.judged.to(logits.device).divergence(logits), len(lesson.judged))
        return mean_over_ranks(sums)

    def _tell(self, done: int, at_most: int, text: str) -> None:
        if self.surroundings.progress is not None:
            self.surroundings.progress(done, at_most, text)

    def record(self, seconds: float) -> FinishRecord:
        before, kept = self.divergences[0], bool(self.changes)
        finite = [one for one in self.divergences if math.isfinite(one)]
        verdict = "held-out samples are nearer to the float model" if kept else "GPTQ's result is best"
        return FinishRecord(
            self.options.kind,
            kept,
            "; ".join([*self.notes, verdict]),
            before,
            min(finite, default=math.nan),
            self.best_step,
            self.steps,
            self.tokens,
            self.rows.samples,
            _tokens(self.held_out.values()),
            "; ".join(f"{count} samples of {source}" for source, count in self.rows.sources.items()),
            self.rows.digest,
            seconds,
            self.options.to_dict(),
            self.curve,
            tuple(self.blocks),
        )


def _refuse_uncounted(rows: Rows, lessons: Sequence[Lesson], token_weighting: str) -> None:
    """Raises CalibrationError if no position to train on, or none to judge on, counts. Collective."""
    trained = len(rows.train)
    for some, what in ((lessons[:trained], "to train on"), (lessons[trained:], "held out, by which it is judged")):
        if not _tokens(some):
            why = "all their labels are -100" if token_weighting == "labels" else "they are padding alone"
            raise CalibrationError(
                f"no position of the finish's samples {what} counts ({why}): leave such samples out, or give more"
            )


def _over_memory(surroundings: Surroundings) -> list[str]:
    """Sentences if any rank's device had to hold more than is allowed. Collective."""
    peak, allowed, told = peak_bytes(surroundings.device), surroundings.memory, None
    if peak is not None and allowed is not None and peak > allowed:
        sizes = f"{peak / 2**20:.0f} MiB on {surroundings.device} at the peak, where {allowed / 2**20:.0f} were allowed"
        told = f"finish: {sizes}"
    return [one for one in dict.fromkeys(distributed.gather_objects(told)) if one is not None]


def _tokens(lessons: Iterable[Lesson]) -> int:
    return sum(distributed.gather_objects(sum(len(lesson.top) for lesson in lessons)))


def _log(text: str) -> None:
    if distributed.rank() == 0:
        log.info("%s", text)
