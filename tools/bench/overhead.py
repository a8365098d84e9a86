"""Process CPU time of a training step: ours against a plain DeepSpeed loop, bare torch, and HF Trainer on DeepSpeed.

All take turns step by step in one process, one rank, one thread, so that other load of the machine affects all of
them equally. Ours is the real `fit` with its meter, trackers and reading thread; the others read the same token
file through a torch DataLoader and read their loss as often as ours logs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils.data import DataLoader, Dataset

from tools.bench.common import LENGTH, configuration, rank_environment, table, write_tokens
from trainer.assembly import assemble
from trainer.config.deepspeed import engine_settings
from trainer.config.load import LoadedConfig
from trainer.data.indexed import IndexedTokens
from trainer.distributed import Launch, World, get_free_port, joined_world
from trainer.fault_tolerance import StopAgreement, StopRequests
from trainer.loop import fit
from trainer.model import build_model, initialize_weights, model_cost
from trainer.topology import Topology
from trainer.tracking import Trackers
from trainer.tracking.jsonl import JsonLines

QUICK: dict[str, Any] = {"sizes": [1], "stages": [0], "rounds": 2}

_LOG_EVERY = 10
_WARM_UP = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[5, 25], choices=(1, 5, 25), help="millions of parameters"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1], choices=(0, 1, 2, 3), help="ZeRO stages")
    parser.add_argument("--rounds", type=int, default=20, help="measured steps of each (default 20)")


class Contestant:
    """A training loop in a separate thread, which advances by one step at a time."""

    def __init__(self, name: str, loop: Callable[[Callable[[], None]], None]) -> None:
        self.name = name
        self.seconds: list[float] = []
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        threading.Thread(target=self._run, args=(loop,), daemon=True).start()

    def _run(self, loop: Callable[[Callable[[], None]], None]) -> None:
        torch.set_num_threads(1)
        try:
            self._go.acquire()
            loop(self._pause)
        except BaseException as error:
            self._error = error
        self._done.release()

    def _pause(self) -> None:
        """Pause between two steps; the loop calls it."""
        self._done.release()
        self._go.acquire()

    def step(self) -> None:
        begin = time.process_time()
        self._go.release()
        self._done.acquire()
        self.seconds.append(time.process_time() - begin)
        if self._error is not None:
            raise self._error


class Samples(Dataset[dict[str, torch.Tensor]]):
    """The token file in the format of Hugging Face's Trainer: labels equal inputs, and the model shifts them."""

    def __init__(self, path: Path) -> None:
        self._tokens = IndexedTokens(path.with_suffix(""))

    def __len__(self) -> int:
        return (self._tokens.tokens - 1) // LENGTH

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self._tokens.stream(number * LENGTH, LENGTH).astype("int64"))
        return {"input_ids": ids, "labels": ids}


def _forever(loaded: LoadedConfig) -> Iterator[dict[str, torch.Tensor]]:
    dataset = Samples(Path(loaded.config.data.train[0].path))
    while True:
        yield from DataLoader(dataset, batch_size=loaded.batch.micro_batch_size, shuffle=True, drop_last=True)


def _model(loaded: LoadedConfig) -> Any:
    model = build_model(loaded)
    initialize_weights(model, 1)
    return model.train()


def ours(loaded: LoadedConfig, world: World, folder: Path) -> Contestant:
    """Run the real `fit`, which pauses when it requests the next batch."""
    trainer = assemble(loaded, world)
    train = trainer.batches.train
    trackers = Trackers({"jsonl": JsonLines(folder / "metrics.jsonl")})

    def loop(pause: Callable[[], None]) -> None:
        steps = train.steps

        def pausing(first: int, last: int) -> Iterator[Any]:
            for batch in steps(first, last):
                yield batch
                pause()  # so that the reading thread prefetches the next batch in our own turn

        train.steps = pausing  # type: ignore[method-assign]
        stop = StopAgreement(StopRequests(), world, trainer.directory, final_step=loaded.steps)
        fit(trainer, trackers, stop)

    return Contestant("Tessera", loop)


def plain_deepspeed(loaded: LoadedConfig) -> Contestant:
    """Run the loop of DeepSpeed's tutorial, with DeepSpeed's clipping."""
    settings = {**engine_settings(loaded.deepspeed_json), "gradient_clipping": loaded.config.deepspeed.clipping}
    model = _model(loaded)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)

    def loop(pause: Callable[[], None]) -> None:
        for step, batch in enumerate(_forever(loaded), start=1):
            loss = engine(**batch, use_cache=False).loss
            engine.backward(loss)
            engine.step()
            if step % _LOG_EVERY == 0:
                loss.item()
            pause()

    return Contestant("plain DeepSpeed", loop)


def bare_torch(loaded: LoadedConfig) -> Contestant:
    model = _model(loaded)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loop(pause: Callable[[], None]) -> None:
        for step, batch in enumerate(_forever(loaded), start=1):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % _LOG_EVERY == 0:
                loss.item()
            pause()

    return Contestant("bare torch", loop)


def hf_trainer(loaded: LoadedConfig, folder: Path) -> Contestant:
    """Hugging Face's Trainer on the same DeepSpeed configuration (needs the package accelerate)."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    model = _model(loaded)
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=loaded.batch.micro_batch_size,
        max_steps=100_000,
        learning_rate=1e-4,
        weight_decay=0.0,
        logging_steps=_LOG_EVERY,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        deepspeed={**loaded.deepspeed_json, "gradient_clipping": loaded.config.deepspeed.clipping},
    )

    def loop(pause: Callable[[], None]) -> None:
        class Pause(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                pause()

        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Samples(Path(loaded.config.data.train[0].path)),
            callbacks=[Pause],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return Contestant("HF Trainer + DeepSpeed", loop)


def run(options: argparse.Namespace) -> dict[str, Any]:
    rank_environment(0, 1, get_free_port())
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder)
        with joined_world(Launch(), Topology.of(1, 0), seed=1) as world:
            for size in options.sizes:
                for stage in options.stages:
                    loaded = configuration(folder, size, zero_optimization={"stage": stage})
                    figures[f"{size}M-zero{stage}"] = _compare(loaded, world, folder, options.rounds)
    return figures


def _compare(loaded: LoadedConfig, world: World, folder: Path, rounds: int) -> dict[str, Any]:
    contestants = [bare_torch(loaded), plain_deepspeed(loaded), ours(loaded, world, folder)]
    try:
        contestants.append(hf_trainer(loaded, folder))
    except ImportError as error:
        print(f"without HF Trainer: {str(error).splitlines()[0]}")
    draw = random.Random(0)
    for number in range(_WARM_UP + rounds):
        for contestant in draw.sample(contestants, len(contestants)):  # no loop always follows the same one
            contestant.step()
        if number == _WARM_UP - 1:
            for contestant in contestants:
                contestant.seconds.clear()
    seconds = {c.name: c.seconds for c in contestants}
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    parameters = model_cost(build_model(loaded)).parameters
    stage = loaded.deepspeed_json["zero_optimization"]["stage"]
    tokens = loaded.batch.batch_size * LENGTH
    print(f"\n{parameters / 1e6:.1f} M parameters, ZeRO {stage}, {tokens} tokens a step, {rounds} steps")
    rows = [
        (
            name,
            f"{1e3 * medians[name]:.1f}",
            _ratio(measured, seconds["plain DeepSpeed"]),
            _ratio(measured, seconds["bare torch"]),
        )
        for name, measured in seconds.items()
    ]
    print(table(("loop", "CPU ms a step", "to plain DeepSpeed", "to bare torch"), rows), flush=True)
    return {"parameters": parameters, "seconds": seconds, "medians": medians}


def _ratio(times: list[float], baseline: list[float]) -> str:
    """Return the median and the middle half of the ratios within a round."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} - {high:.3f})"
