"""What every benchmark is made of: options, rows that outlive an interruption, paired intervals, timing, one JSON file.

A benchmark says what it measures, its settings and its gates. A judged one has a row of figures for each case:

    run = Run("edit_siso", arguments, Settings(), cases=16)
    rows = run.rows(run.chosen(edits), lambda: Bench(run.base), lambda bench, edit: bench.row(edit, run.settings))
    return run.judged(rows, summary(rows))

One of costs has a table of figures, each beside the bare model calls:

    run = Run("cost_guidance", arguments, Settings())
    found = run.table(figures(Bench(run.base)))
    return run.costs(found, {name: found[name]["ratio"] <= GATE for name in found})
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import hosting

HELP = ("-h", "--help")  # for the whole command line, not for the world alone
Rows = list[dict[str, Any]]


def say(line: str) -> None:
    """Write a line to the console at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write(path: Path | None, content: Any) -> None:
    """Write JSON, if there is a path."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


class Run:
    """One run of a benchmark, from its command line to its exit code.

    Every field of `settings`, a frozen dataclass, becomes an option; a field's metadata goes to argparse. With settings
    for several worlds, by name, the option --world chooses among them. `count` names the cases and says how many there
    are by default (subjects=16). ComfyUI is started here, so that what needs it is
    imported afterwards.
    """

    def __init__(
        self,
        name: str,
        arguments: list[str],
        settings: Any = None,
        options: Mapping[str, dict[str, Any]] | None = None,
        threads: int = 2,
        **count: int,
    ) -> None:
        parser = argparse.ArgumentParser(prog=f"benchmarks.{name}")
        self.world = ""
        if isinstance(settings, Mapping):
            parser.add_argument("--world", choices=tuple(settings), default=next(iter(settings)))
            self.world = vars(parser.parse_known_args([each for each in arguments if each not in HELP])[0])["world"]
            settings = settings[self.world]
        for each, default in count.items():
            parser.add_argument(f"--{each}", dest="count", type=int, default=default)
            parser.add_argument("--first", type=int, default=0, help="skip so many of them")
            if each in ("subjects", "cases"):
                parser.add_argument("--harder", action="store_true", help="those with fine parts, and their own judge")
            parser.add_argument("--rows", type=Path, help="store each row here, and go on from them; or finished .json")
            parser.add_argument("--runs", type=Path, help="keep finished trainings here, and take them from here")
        for each, how in (options or {}).items():
            parser.add_argument(each, **how)
        offered = [each for each in fields(settings) if not isinstance(each.default, bool)] if settings else []
        for each in offered:
            parser.add_argument(f"--{each.name.replace('_', '-')}", **option(getattr(settings, each.name), each))
        parser.add_argument("--threads", type=int, default=threads)
        parser.add_argument("--out", type=Path, help="write the figures as JSON")
        self.options = parser.parse_args(arguments)
        chosen = {each.name: getattr(self.options, each.name) for each in offered}
        self.settings: Any = replace(settings, **chosen) if settings else None
        self.base = hosting.start(self.options.threads)
        hosting.keep_runs(getattr(self.options, "runs", None))
        self.seeds: list[int] = []

    def chosen(self, cases: Callable[..., list[Any]]) -> list[Any]:
        """The cases that the options ask for; `cases` gives the first so many, with harder=True of the harder ones."""
        harder = {"harder": True} if getattr(self.options, "harder", False) else {}
        return cases(self.options.first + self.options.count, **harder)[self.options.first :]

    def rows(
        self,
        cases: Sequence[Any],
        make_bench: Callable[[], Any],
        row_of: Callable[[Any, Any], dict[str, Any]],
        label: Callable[[Any], dict[str, str]] = lambda case: {"subject": case.label},
    ) -> Rows:
        """A row for each case, stored as soon as it is there. A stored row of the same label is not measured again; the
        models are loaded when the first row has to be.
        """
        path, rows, bench = self.options.rows, [], None
        finished = path is not None and path.suffix == ".json"
        known: Rows = []
        if path and path.exists():
            text = path.read_text()
            known = json.loads(text)["rows"] if finished else [json.loads(line) for line in text.splitlines()]
        for case in cases:
            about = label(case)
            at = next((at for at, row in enumerate(known) if about.items() <= row.items()), None)
            if at is not None:
                rows.append(known.pop(at))
                continue
            bench = bench or make_bench()
            rows.append({**about, **row_of(bench, case)})
            if path and not finished:
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            say(f"{len(rows):3d} {', '.join(about.values())}: {shown(rows[-1])}")
        self.seeds = list(dict.fromkeys(case.seed for case in cases if hasattr(case, "seed")))
        return rows

    def judged(
        self,
        rows: Rows,
        summary: dict[str, Any],
        held: bool | None = None,
        settings: dict[str, Any] | None = None,
        flat: bool = False,
    ) -> int:
        """Show the summary, store it with settings, seeds and rows (flat: its entries beside them); the exit code says
        whether the gates held."""
        say(json.dumps(summary, indent=1))
        world = {"world": self.world} if self.world else {}
        if getattr(self.options, "harder", False):
            world["harder"] = True
        stored = {**world, **(settings or asdict(self.settings)), "seeds": self.seeds}
        write(self.options.out, {"settings": stored, **(summary if flat else {"summary": summary}), "rows": rows})
        return int(not (summary["gates held"] if held is None else held))

    def table(self, figures: Iterable[tuple[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
        """Show each line of figures as soon as it is there."""
        found = {}
        for name, values in figures:
            found[name] = values
            say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()))
        return found

    def costs(self, figures: dict[str, Any], gates: Mapping[str, bool]) -> int:
        """Store the figures with what they were measured on; the exit code says whether the gates held."""
        write(self.options.out, {**figures, "torch": torch.__version__, "threads": self.options.threads})
        missed = [name for name, held in gates.items() if not held]
        say(f"missed gates: {', '.join(missed) or 'none'}")
        return int(bool(missed))


def option(value: Any, about: Any) -> dict[str, Any]:
    """What argparse is told about a setting."""
    many = isinstance(value, tuple)
    kind = {"type": type(value[0] if many else value), "default": value, **({"nargs": "+"} if many else {})}
    return {**kind, **about.metadata}


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, short enough for a console."""
    parts = {name: part for name, part in row.items() if isinstance(part, (dict, float))}
    return {
        name: " ".join(f"{value:.3g}" for value in (part.values() if isinstance(part, dict) else [part]))
        for name, part in parts.items()
    }


def mean(values: Iterable[float]) -> float:
    """The plain mean."""
    found = list(values)
    return sum(found) / len(found)


def kinds_of(rows: Rows) -> list[str]:
    """What a row has scores of."""
    return [name for name, part in rows[0].items() if isinstance(part, dict)]


def means(rows: Rows, *kinds: str) -> dict[str, dict[str, float]]:
    """The mean over the rows of every score of some kinds, or of all."""
    return {
        kind: {score: mean(row[kind][score] for row in rows) for score in rows[0][kind]}
        for kind in kinds or kinds_of(rows)
    }


def interval(
    differences: Iterable[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """The mean of paired differences with its bootstrap interval (percentile method, Efron 1979), the share above 0,
    and how many there are.

    Whole pairs are resampled, so they may differ in difficulty. ValueError for fewer than two pairs or non-finite
    values.
    """
    d = torch.tensor(list(differences), dtype=torch.float64)
    if d.numel() < 2 or not bool(torch.isfinite(d).all()):
        raise ValueError(f"{d.numel()} differences were given: an interval needs at least two finite ones.")
    draws = torch.randint(d.numel(), (resamples, d.numel()), generator=torch.Generator().manual_seed(seed))
    tails = torch.tensor([(1.0 - level) / 2.0, (1.0 + level) / 2.0], dtype=torch.float64)
    low, high = torch.quantile(d[draws].mean(1), tails).tolist()
    share = float((d > 0).double().mean())
    return {"mean": float(d.mean()), "low": low, "high": high, "share_won": share, "count": d.numel()}


def gain(rows: Rows, kind: str, base: str, score: str) -> dict[str, Any]:
    """The interval of one kind's score above another's."""
    return interval(row[kind][score] - row[base][score] for row in rows)


def gated(figures: dict[str, Any], gates: dict[str, bool]) -> dict[str, Any]:
    """A summary with its gates."""
    return {**figures, "gates": gates, "gates held": all(gates.values())}


def ranks(values: Sequence[float]) -> torch.Tensor:
    """Rank of each value; equal ones share the mean of theirs."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return torch.stack([(numbers < x).sum() + ((numbers == x).sum() - 1) / 2 for x in numbers])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([ranks(one), ranks(other)]).double())[0, 1])


def by_turns(
    ours: Callable[[], object],
    bare: Callable[[], object],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of both, run by turns in this process after two warm-up rounds, and their ratio. A slow moment of
    the machine hits both, so that the ratio counts, not the seconds. On one thread, time.process_time does not count
    the time that other programs take.
    """
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    for turn in range(rounds + 2):
        pair = [("ours", ours), ("bare", bare)]
        for name, run in pair if turn % 2 else reversed(pair):
            began = clock()
            run()
            if turn >= 2:
                times[name].append(clock() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {**medians, "ratio": medians["ours"] / medians["bare"]}


def update(loss: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A bare training step."""

    def step() -> None:
        value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()

    return step


def weights(*modules: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(value.nbytes for module in modules for value in [*module.parameters(), *module.buffers()])


def held_for_backward(run: Callable[[], object]) -> int:
    """Peak bytes that autograd keeps while run() goes forward, each storage once."""
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(held.values())


def most_alive(run: Callable[[], object]) -> int:
    """The most bytes of tensors, made by run() itself, that are alive at once; counted at every operation."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.total = self.most = 0
            self.known: dict[int, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.meet((args, kwargs or {}), False)
            out = func(*args, **(kwargs or {}))
            self.meet(out, True)
            return out

        def meet(self, values: Any, made: bool) -> None:
            for value in tree_leaves(values):
                storage = value.untyped_storage() if isinstance(value, torch.Tensor) else None
                if storage is None or id(storage) in self.known:
                    continue
                self.known[id(storage)] = storage.nbytes() if made else 0
                self.total += self.known[id(storage)]
                self.most = max(self.most, self.total)
                weakref.finalize(storage, self.forget, id(storage))

        def forget(self, key: int) -> None:
            self.total -= self.known.pop(key, 0)

    with Alive() as alive:
        run()
    return alive.most


@contextlib.contextmanager
def measured_training(measure: Callable[[Any], None]) -> Iterator[None]:
    """Within it, a training is handed to measure(), inside its session, and then ends."""
    from ..core.session import job

    class Measured(Exception):
        pass

    def train(fit: Any, *_args: Any, **_more: Any) -> None:
        measure(fit)
        raise Measured

    before, job.train = job.train, train  # ty: ignore[invalid-assignment]
    try:
        with contextlib.suppress(Measured), torch.inference_mode():
            yield
    finally:
        job.train = before
