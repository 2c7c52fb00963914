"""Runs of the command line, each made once and tested once, for benchmarks that compare configs."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any, TypeVar

import yaml

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
Result = TypeVar("Result")


class Runs:
    """The runs of one seed, in a folder of their own. What was finished is not run again, so a killed benchmark goes on.

    A run is made again where the command, a config or a run that it needs has changed since, and then tested again; figures
    and comments in a config's header do not count. Changes of code are not seen: delete the folder after them. One that was
    killed goes on from its last checkpoint, and a test in the store that it had begun.

    Args:
        folder: working directory of the commands; runs lie in ``runs/`` below it.
        seed: of all of them.
        options: further arguments of every fit, such as ``--data.init_args.fold 0``.
    """

    def __init__(self, folder: Path, seed: int, options: Sequence[str] = ()) -> None:
        self.folder, self.seed, self.options = folder, seed, tuple(options)
        self._lock, self._locks = Lock(), {}
        folder.mkdir(parents=True, exist_ok=True)

    def fit(self, command: str) -> str:
        """Run ``robust-pl fit -c configs/digits/x.yaml ...`` and what its configs need, unless it is done.

        Returns:
            What it was made by, which :meth:`test` compares.
        """
        arguments = shlex.split(command)
        if arguments[0] != "robust-pl":  # python -m benchmarks.NAME FILE --seed SEED
            return self._once(Path(arguments[3]).stem, [*arguments[1:-1], str(self.seed)], [])
        name = name_of(command)
        if "--run.name" in arguments:  # it comes last, so that it is one command whether it is said or not
            del arguments[(said := arguments.index("--run.name")) : said + 2]
        places = [i + 1 for i, argument in enumerate(arguments) if argument == "-c"]
        configs = [ROOT / arguments[place] for place in places]
        made_by = [self.fit(needed) for config in configs for needed in needs(config)]
        for place, config in zip(places, configs, strict=True):
            arguments[place] = str(config)
        seed = () if "--seed_everything" in arguments else ("--seed_everything", str(self.seed))
        whole = ["-m", "robust_pl", *arguments[1:], *seed, *self.options, "--run.name", name]
        return self._once(name, whole, [*made_by, *(yaml.safe_load(config.read_text()) for config in configs)])

    def test(
        self,
        run: str,
        made_by: str,
        attacks: tuple[str, Mapping[str, Any]] | None = None,
        checkpoint: str = "best",
        options: Sequence[str] = (),
        weights: str | None = None,
    ) -> dict[str, Any]:
        """Figures of a test of a run, those of each set of weights, and the cost of its training.

        Args:
            run: its name.
            made_by: what :meth:`fit` returned for it.
            attacks: a name for them, and the attacks, instead of the run's own.
            checkpoint: ``best`` or ``last``.
            options: further arguments of the test.
            weights: ``raw``, or the name of an average, to test these alone; None tests all that there are.

        Returns:
            ``figures`` by weights, ``cost``, and ``predictions``, the table of the raw weights, or of those asked for.
        """
        key = "_".join(["own" if attacks is None else attacks[0], *([checkpoint] * (checkpoint != "best"))])
        key += f"_{weights}" if weights else ""
        tests, where = self.folder / "tests" / run, self.folder / "runs" / run
        tests.mkdir(parents=True, exist_ok=True)
        kept, output, asked = tests / f"{key}.json", tests / key, digest([made_by, attacks, list(options)])
        found = json.loads(kept.read_text()) if kept.exists() else {}
        if found.get("asked") != asked:
            for old in tests.glob(f"{key}*/"):
                shutil.rmtree(old)
            found = {"asked": asked}
            kept.write_text(json.dumps(found))
        if "figures" not in found:
            tested, average = f"{where}/checkpoints/{checkpoint}.ckpt", weights not in (None, "raw")
            if average:  # a run of their own, which starts from them
                chosen = ["--model.init_args.weights", f"{tested}#{weights}", "--run.output_dir", str(tests / "runs")]
            else:
                chosen = ["--ckpt_path", tested, *(["--evaluation.averages", "false"] if weights else [])]
            given = []
            if average or attacks is not None:
                given += ["-c", str(where / "config.yaml")]
            if attacks is not None:
                (tests / f"{key}.yaml").write_text(yaml.safe_dump({"attacks": attacks[1]}, sort_keys=False))
                given += ["-c", str(tests / f"{key}.yaml")]
            # What comes later counts.
            arguments = ["-m", "robust_pl", "test", *given, *chosen, *options, "--evaluation.output_dir", str(output)]
            self._run(f"{run}-{key}.test", arguments)
            found["figures"] = {
                path.name.removeprefix(key).strip("-") or weights or "raw": json.loads((path / "figures.json").read_text())
                for path in [output, *tests.glob(f"{key}-*/")]
                if path == output or path.name.removeprefix(f"{key}-").isalpha()
            }
            found["cost"] = json.loads((where / "compute.json").read_text())
            kept.write_text(json.dumps(found, indent=1))
        return {**found, "predictions": output / "predictions.csv"}

    def _once(self, name: str, arguments: Sequence[str], origin: Sequence[Any]) -> str:
        with self._lock:
            lock = self._locks.setdefault(name, Lock())
        made_by, done = digest([arguments, origin]), self.folder / f"{name}.done"
        with lock, alone(self.folder / f"{name}.lock"):
            if not done.exists() or done.read_text() != made_by:
                self._go_on_or_begin(name, arguments, made_by)
                done.write_text(made_by)
        return made_by

    def _go_on_or_begin(self, name: str, arguments: Sequence[str], made_by: str) -> None:
        """A run that a killed benchmark had begun in the same way goes on from its last checkpoint."""
        where, begun = self.folder / "runs" / name, self.folder / f"{name}.begun"
        last = where / "checkpoints" / "last.ckpt"
        if last.exists() and begun.exists() and begun.read_text() == made_by:
            self._run(f"{name}.resumed", ["-m", "robust_pl", "fit", "--ckpt_path", str(last)])
            return
        shutil.rmtree(where, ignore_errors=True)
        begun.write_text(made_by)
        self._run(f"{name}.fit", arguments)

    def _run(self, log: str, arguments: Sequence[str]) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": path}
        began = time.perf_counter()
        with (self.folder / f"{log}.log").open("w") as file:
            command = [sys.executable, *arguments]  # which inherits what `alone` holds
            done = subprocess.run(command, cwd=self.folder, env=environment, stdout=file, stderr=file, close_fds=False)
        if done.returncode:
            tail = "\n".join((self.folder / f"{log}.log").read_text().splitlines()[-5:])
            raise SystemExit(f"python {shlex.join(arguments)} failed in {self.folder}:\n{tail}")
        print(f"{self.folder.name} {log}: {time.perf_counter() - began:.0f} s", flush=True)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a file here and in the processes started meanwhile: what a killed benchmark left running is waited for."""
    with path.open("w") as file:
        if fcntl is not None:
            os.set_inheritable(file.fileno(), True)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"Waiting for what another benchmark started: {path.with_suffix('')}", flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(value: Any) -> str:
    """A short name for plain values, the same in every process."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def name_of(command: str) -> str:
    """The run that a command ``robust-pl fit ...`` makes."""
    arguments = shlex.split(command)
    if "--run.name" in arguments:
        return arguments[arguments.index("--run.name") + 1]
    return Path(arguments[arguments.index("-c") + 1]).stem


def needs(config: Path) -> list[str]:
    """Commands that the header of a config names as run before it."""
    lines = config.read_text().splitlines()
    return [line.removeprefix("# needs: ") for line in lines if line.startswith("# needs: ")]


def at_once(tasks: Sequence[Callable[[], Result]], workers: int) -> list[Result]:
    """Results in the order of the tasks, which begin in that order, as many at a time as there are workers.

    Where one fails, those that have not begun are left out.
    """
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return [future.result() for future in futures]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean, and the standard deviation over seeds."""
    if any(isnan(value) for value in values):
        return "none"  # such as the NSD where nobody is right
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, ["---"] * len(head), *body))
