"""Compares a user's configuration in several layouts with the reference in one process.

It compares the losses and gradient norms of three steps, every gradient of the first step, and every parameter after
the last step; for a layout that differs, the blocks' outputs locate the first difference. Then the command itself goes
from each layout to the next through a checkpoint, and its export is compared.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

from tools import ranks
from tools.parity import comparison_jobs
from tools.parity.compared_config import STEPS, ComparedConfig, deepspeed_section, prepare
from tools.parity.comparison_jobs import ComparisonJob, RankDifferences, Reference, Refusal
from tools.parity.gradient_proof import TOLERANCE
from tools.parity.layout import Layout
from tools.parity.text import last_line
from tools.parity.training_proof import prove_training
from trainer.assembly import plan_model
from trainer.config.load import check_config
from trainer.errors import ConfigError, Problem

SECONDS = 24 * 3600.0
"""Time limit of a layout: a model may be large and a machine slow."""


@dataclass
class LayoutRow:
    """A row of the table."""

    layout: Layout
    verdict: str
    """`equal`, `differs`, `refused` or `failed`."""

    loss: float = math.nan
    norm: float = math.nan
    gradients: float = math.nan
    parameters: float = math.nan
    remarks: list[str] = field(default_factory=list)
    refusal: list[Problem] = field(default_factory=list)


def compare(path: Path, layouts: list[Layout], overrides: list[str], *, shrink: bool) -> int:
    """Compare `layouts` of the configuration at `path` with one process, and print the result.

    Returns:
        0 if all agree, 1 if one differs.

    Raises:
        ConfigError: a mistake in the file or a layout; a layout that the model cannot have.
    """
    subject = prepare(path, overrides, shrink=shrink)
    global_micro_batches = math.lcm(*(layout.data * (layout.accumulation or 1) for layout in layouts))
    jobs = [_job(subject, layout, global_micro_batches, (1.0, 1.0)) for layout in layouts]
    _refuse_early(jobs)
    lines = []
    known: dict[int, tuple[ComparisonJob, Reference]] = {}
    with ranks.time_limit(SECONDS), tempfile.TemporaryDirectory(prefix="tessera-parity-") as folder:
        for job in jobs:
            if job.micro_batches not in known:
                known[job.micro_batches] = _run_reference(job, Path(folder), subject, first=not known)
            lines.append(_run_layout(job, *known[job.micro_batches], subject, global_micro_batches))
        _print_table(lines)
        refused = [problem for line in lines for problem in line.refusal]
        if refused:
            raise ConfigError(refused)
        is_trained = _train(subject, layouts if len(layouts) > 1 else [*layouts, Layout(name="one process")])
    return int(not is_trained or any(line.verdict != "equal" for line in lines))


def _train(subject: ComparedConfig, layouts: list[Layout]) -> bool:
    """Train with `launch/train.py` as a run does: data, steps, checkpoints, the export."""
    sections = {key: subject.raw[key] for key in ("model", "training")}
    sections["run"] = {"plugins": subject.raw["run"].get("plugins", [])}
    sections["parallel"] = {"tensor_plan": subject.raw["parallel"].get("tensor_plan", {})}
    sections["deepspeed"] = {"zero_optimization": subject.raw["deepspeed"]["zero_optimization"]}
    print(
        f"launch/train.py: a step as {', resumed as '.join(map(str, layouts))}; the export ...",
        flush=True,
    )
    began = time.monotonic()
    verdict = prove_training("the model", sections, layouts, length=subject.raw["data"]["sequence_length"])
    outcome = "equal" if verdict.outcome == "right" else verdict.outcome
    print(
        f"  {f'{outcome}: {verdict.reason}' if verdict.reason else outcome}; {time.monotonic() - began:.1f} s",
        flush=True,
    )
    return verdict.outcome == "right"


def _job(
    subject: ComparedConfig, layout: Layout, global_micro_batches: int, sgd: tuple[float, float], folder: str = ""
) -> ComparisonJob:
    """Return the layout's job: a global batch of `global_micro_batches` micro-batches, perhaps merged into fewer."""
    count = layout.data * layout.accumulation if layout.accumulation else global_micro_batches
    samples = subject.samples * global_micro_batches // count
    raw = layout.apply_to(subject.raw)
    zero = raw["deepspeed"]["zero_optimization"]
    raw["deepspeed"] = deepspeed_section(zero, count, count // layout.data, samples, sgd)
    return ComparisonJob(raw, layout, count, samples, folder)


def _refuse_early(jobs: list[ComparisonJob]) -> None:
    """Refuse layouts that do not fit the model before anything is computed."""
    problems: list[Problem] = []
    for job in jobs:
        try:
            loaded = check_config(job.raw, world_size=job.layout.world_size, device="cpu")
            plan_model(loaded)
        except ConfigError as error:
            problems += [_of_layout(job.layout, problem) for problem in error.problems]
    if problems:
        raise ConfigError(problems)


def _of_layout(layout: Layout, problem: Problem) -> Problem:
    where = f"--layouts {layout}"
    return Problem(f"{where}: {problem.path}" if problem.path else where, problem.reason, problem.remedy)


def _run_reference(
    job: ComparisonJob, folder: Path, subject: ComparedConfig, *, first: bool
) -> tuple[ComparisonJob, Reference]:
    below = folder / str(job.micro_batches)
    below.mkdir()
    raw = deepcopy(job.raw)
    raw["parallel"] = {}
    raw["deepspeed"] = deepspeed_section({}, job.micro_batches, job.micro_batches, job.samples, (1.0, 1.0))
    reference_job = ComparisonJob(raw, Layout(name="one process"), job.micro_batches, job.samples, str(below))
    for note in subject.notes if first else ():
        print(f"note: {note}")
    rows, length = job.micro_batches * job.samples, raw["data"]["sequence_length"]
    print(
        f"one process, plain torch: {STEPS} steps on {rows} x {length} random tokens, "
        f"{job.micro_batches} micro-batch{'es' * (job.micro_batches > 1)} ...",
        flush=True,
    )
    try:
        result = ranks.run_ranks(comparison_jobs.reference, 1, reference_job)[0]
    except AssertionError as error:
        raise ConfigError(
            Problem(
                "model",
                f"the plain Hugging Face model fails: {last_line(str(error))}",
                f"The full report is in {_report(str(error))}",
            )
        ) from None
    if isinstance(result, Refusal):
        raise ConfigError(result.problems)
    if first and result.dropout:
        print(f"note: dropout set to 0 ({', '.join(result.dropout)})")
    print(
        f"  {result.parameters:,} parameters; losses {', '.join(f'{loss:.4f}' for loss in result.losses)}; SGD at "
        f"{result.rate:.2g}, clipped at {result.clipping:.3g}; {result.seconds:.1f} s",
        flush=True,
    )
    return reference_job, result


def _report(text: str) -> str:
    """Write a rank's full report to a file. Return its path."""
    descriptor, path = tempfile.mkstemp(prefix="tessera-parity-", suffix=".log")
    os.write(descriptor, text.encode())
    os.close(descriptor)
    return path


def _run_layout(
    job: ComparisonJob,
    reference_job: ComparisonJob,
    expected: Reference,
    subject: ComparedConfig,
    global_micro_batches: int,
) -> LayoutRow:
    job = _job(subject, job.layout, global_micro_batches, (expected.rate, expected.clipping), reference_job.folder)
    accumulation = job.micro_batches // job.layout.data
    extra = f", accumulation {accumulation}" if accumulation > 1 else ""
    print(f"{job.layout}: {job.layout.world_size} process{'es' * (job.layout.world_size > 1)}{extra} ...", flush=True)
    began = time.monotonic()
    try:
        results = ranks.run_ranks(comparison_jobs.layout, job.layout.world_size, job, expected)
    except AssertionError as error:
        line = LayoutRow(job.layout, "failed")
        line.remarks = [last_line(str(error)), f"the full report is in {_report(str(error))}"]
    else:
        line = _judge(job.layout, results, expected)
    print(f"  {line.verdict}; {time.monotonic() - began:.1f} s", flush=True)
    return line


def _judge(layout: Layout, results: list[RankDifferences | Refusal], expected: Reference) -> LayoutRow:
    refusals = [problem for result in results if isinstance(result, Refusal) for problem in result.problems]
    differences = [result for result in results if isinstance(result, RankDifferences)]
    if refusals:
        return LayoutRow(layout, "refused", refusal=[_of_layout(layout, p) for p in dict.fromkeys(refusals)])
    gradients = _worst([result.gradients for result in differences])
    parameters = _worst([result.parameters for result in differences])
    outputs = _worst([result.outputs for result in differences])
    line = LayoutRow(layout, "equal")
    line.loss = max(max(result.losses) for result in differences)
    line.norm = max(max(result.norms) for result in differences)
    line.gradients, line.parameters = max(gradients.values()), max(parameters.values())
    if all(value <= TOLERANCE for value in (line.loss, line.norm, line.gradients, line.parameters)):
        return line
    line.verdict = "differs"
    line.remarks = _remarks(gradients, parameters, outputs, expected)
    return line


def _worst(by_rank: list[dict[str, float]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for errors in by_rank:
        for key, error in errors.items():
            worst[key] = max(worst.get(key, 0.0), error)
    return worst


def _remarks(
    gradients: dict[str, float], parameters: dict[str, float], outputs: dict[str, float], expected: Reference
) -> list[str]:
    remarks = []
    name, worst = max(gradients.items(), key=lambda item: item[1])
    if worst > TOLERANCE:
        wrong = sum(error > TOLERANCE for error in gradients.values())
        remarks.append(
            f"worst parameter: {name}, gradient off by {worst:.2g} of its largest element "
            f"({wrong} of {len(gradients)} gradients differ)"
        )
    else:
        name, worst = max(parameters.items(), key=lambda item: item[1])
        if worst > TOLERANCE:
            remarks.append(
                f"worst parameter: {name}, off by {worst:.2g} of what it changed in {STEPS} steps; the "
                "first step's gradients agree"
            )
    return [*remarks, f"first block that differs: {_first_block(gradients, parameters, outputs, expected)}"]


def _first_block(
    gradients: dict[str, float], parameters: dict[str, float], outputs: dict[str, float], expected: Reference
) -> str:
    """Search the first step's outputs, its gradients from the end, then the second step's outputs."""
    later = [key for key in expected.outputs if outputs.get(key, math.inf) > TOLERANCE]
    if later and later[0].startswith("1/"):
        return f"{later[0].split('/', 2)[2]}, by its output"
    for errors, what in (
        (gradients, "by its gradients; all outputs agree, and backward runs from the end"),
        (parameters if not later else {}, "by its parameters after the last step"),
    ):
        wrong = [name for name in expected.scales if errors.get(name, 0.0) > TOLERANCE]
        if wrong:
            inside = [n for n in wrong if any(n.startswith(f"{block}.") for block in expected.blocks)]
            last = (inside or wrong)[-1]
            block = next((b for b in expected.blocks if last.startswith(f"{b}.")), last.rpartition(".")[0])
            return f"{block}, {what}"
    if later:
        return f"{later[0].split('/', 2)[2]}, by its output in the second step; the first step's gradients agree"
    return "none; the loss or the norm is computed differently"


def _print_table(lines: list[LayoutRow]) -> None:
    columns = ("layout", "processes", "loss", "norm", "gradients", "parameters", "verdict")
    cells = []
    for line in lines:
        numbers = (line.loss, line.norm, line.gradients, line.parameters)
        differences = ["" if math.isnan(number) else f"{number:.1e}" for number in numbers]
        cells.append([str(line.layout), str(line.layout.world_size), *differences, line.verdict])
    widths = [max(len(row[n]) for row in [list(columns), *cells]) for n in range(len(columns))]
    print(
        "\nLargest relative differences from one process "
        f"(of gradients and parameters: of an element, as a share of the tensor's largest; at most {TOLERANCE:g}):\n"
    )
    print("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())
    for line, row in zip(lines, cells, strict=True):
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
        for remark in line.remarks:
            print(f"    {remark}", flush=True)
