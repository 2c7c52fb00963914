"""LightningCLI with attacks, a run folder, tracking and checkpoints."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from pydoc import locate
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, LearningRateMonitor
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from . import callbacks, data, methods, nets
from .callbacks import Attack, ComputeMonitor, ImageGrid, ProgressBar, RobustEvaluation
from .callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from .callbacks.monitors.compute import cost_in
from .callbacks.outcome import check_names
from .cli_help import DESCRIPTION, RUNS, SUBCOMMANDS, configs_in
from .cli_monitor import choose_monitor
from .cli_parser import Instantiator, Parser, link_data_to_net
from .cli_settings import ReportOptions, Run, StoreConfig, request_of
from .data import ImageDataModule
from .methods import Method
from .methods.ranks import leave, others_wait
from .nets.reference import resolve
from .run_folder import RunFolder, hardware, versions


class RobustCLI(LightningCLI):
    """The command line of a run."""

    config_name: str | None = None

    @classmethod
    def start(cls, arguments: Sequence[str]) -> RobustCLI:
        """Parse and run, as ``robust-pl ARGUMENTS`` does.

        Args:
            arguments: of the command line, with the subcommand first.
        """
        for module in (methods, callbacks, data, nets):
            for name in module.__all__:  # short names resolve among the classes that are imported
                getattr(module, name)
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
        for expected in (
            ".*LeafSpec.*",  # Lightning's use of torch
            "Be aware that when using `ckpt_path`, callbacks",  # only fit has the callback that writes checkpoints
            "The dirpath has changed from",  # or, under another name, in a new one
            "Checkpoint directory .* exists and is not empty",  # a resumed run goes on in its own folder
        ):
            warnings.filterwarnings("ignore", message=expected)
        atexit.register(leave)
        # Processes that Lightning starts run the same command, so it must stand in sys.argv.
        sys.argv = [sys.argv[0], *arguments]
        return cls(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            parser_class=Parser,
            parser_kwargs={"parser_mode": "omegaconf", "prog": "robust-pl", "description": DESCRIPTION},
            trainer_defaults={
                "use_distributed_sampler": False,
                "enable_autolog_hparams": False,
                "num_sanity_val_steps": 1,
                "log_every_n_steps": 10,
            },
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--attacks", type=dict[str, Attack], default={}, help="Evaluation attacks by name.")
        parser.add_argument(
            "--val_attacks",
            type=dict[str, Attack] | None,
            default=None,
            help="Evaluation attacks for validation alone, cheaper ones say; by default those of --attacks.",
        )
        parser.add_lightning_class_args(RobustEvaluation, "evaluation")
        parser.add_class_arguments(Run, "run")
        parser.add_class_arguments(ReportOptions, "report")
        link_data_to_net(parser)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.init_args.attack.init_args.seed", compute_fn=int)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        self._subcommand_parsers = {}
        listed = parser.add_subcommands()
        # To build the parser of a run takes its time, and the others are only asked where a config stands before the
        # subcommand and has a part for each. Commands without a Trainer are run by `cli.main`.
        asked = [name for name in RUNS if [name] == sys.argv[1:2]] or list(RUNS)
        for name, says in SUBCOMMANDS.items():
            if name in asked:
                own = self._prepare_subcommand_parser(self.trainer_class, name, description=says)
                self._subcommand_parsers[name] = own
            else:
                own = Parser(description=says)
            listed.add_subcommand(name, own, help=says)

    def _add_instantiators(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated in jsonargparse 4.49, and what Lightning itself still calls
            self.parser.add_instantiator(Instantiator(cli=self, key="model"), LightningModule, subclasses=True)
            self.parser.add_instantiator(Instantiator(cli=self, key="data"), LightningDataModule, subclasses=True)

    def _parse_ckpt_path(self) -> None:
        """Lightning would import whatever class the checkpoint names; `cli.main` has done it with care."""

    @property
    def _classifies(self) -> bool:
        """Whether a classifier is trained or tested; what fits a scene has no accuracy, and its own metric."""
        return isinstance(self.model, Method)

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        named = [getattr(config.get(key), "class_path", None) for key in ("model", "data")]
        if None in named:
            return
        (model, data), (path, data_path) = map(locate, named), named
        if issubclass(model, Method) != issubclass(data, ImageDataModule):
            raise ValueError(
                f"model={path} cannot learn from data={data_path}: a method takes an ImageDataModule, FieldFit a "
                "PosedPhotosDataModule"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config[self.subcommand]
        self._dump_config()
        stored = {k: v for k, v in self.config_dump.items() if k not in ("ckpt_path", "weights_only", "return_predictions")}
        self.request = request_of(self.subcommand, stored, config.ckpt_path)
        run = self._run_folder(config)
        settings = self._get(self.config_init, "trainer", default={})
        attacks = self._named_attacks()
        own = settings.get("callbacks") or []
        own = own if isinstance(own, list) else [own]
        extra: list[Callback] = [*attacks, StoreConfig(stored)]
        if self._classifies:
            extra += self._measuring(run, own)
        if self.subcommand == "fit":
            extra += self._checkpoints(run, config, settings, attacks)
        else:
            kwargs["enable_checkpointing"] = False
            own = [callback for callback in own if not isinstance(callback, Checkpoint)]
        if settings.get("enable_progress_bar") is not False and not any(isinstance(c, LightningBar) for c in own):
            extra.append(ProgressBar())
        if settings.get("logger") in (None, True):
            kwargs["logger"] = self._loggers(run, stored)
            if self.subcommand == "fit":
                extra.append(LearningRateMonitor())
        _write_config(run.path, self.subcommand, stored)
        settings = {**settings, "callbacks": own, "default_root_dir": str(run.path), **kwargs}
        return self._instantiate_trainer(settings, extra)

    def _measuring(self, run: RunFolder, own: list[Callback]) -> list[Callback]:
        """The evaluation, its pictures and what training costs; taken out of the user's own where they are there."""
        extra: list[Callback] = [self._evaluation(run, own)]
        if self.subcommand in ("fit", "test") and not any(isinstance(callback, ImageGrid) for callback in own):
            extra.append(ImageGrid())
        if self.subcommand == "fit" and not any(isinstance(callback, ComputeMonitor) for callback in own):
            extra.append(ComputeMonitor())
        return extra

    def _evaluation(self, run: RunFolder, own: list[Callback]) -> RobustEvaluation:
        """The user's own, taken out of the trainer's list, else that of ``--evaluation``."""
        found = [callback for callback in own if isinstance(callback, RobustEvaluation)]
        evaluation = found[0] if found else self._get(self.config_init, "evaluation")
        own[:] = [callback for callback in own if callback not in found]
        if self.subcommand in ("test", "predict") and evaluation.output_dir is None:
            # Of several processes the first one's folder counts; the evaluation tells the others.
            folder = run.evaluation(self.subcommand, self.request) if rank_zero_only.rank == 0 else run.path
            evaluation.output_dir = str(folder)
        self.evaluation = evaluation
        evaluation.request = self.request
        evaluation.notes = {"name": run.record().get("name", run.path.name), "versions": versions()}
        if checkpoint := self.config[self.subcommand].get("ckpt_path"):
            # As seen from the folder that holds the evaluation's, so that both can move together.
            beside = Path(evaluation.output_dir).parent if evaluation.output_dir else run.path
            evaluation.notes["checkpoint"] = os.path.relpath(os.path.realpath(checkpoint), os.path.realpath(beside))
        if cost := self._cost():
            evaluation.notes["cost"] = cost
        return evaluation

    def _cost(self) -> dict[str, Any] | None:
        """What the training of the tested weights cost, where their file says so."""
        config = self.config[self.subcommand]
        tested = config.get("ckpt_path") or config.get("model.init_args.weights")
        return cost_in(resolve(tested).path) if tested and self.subcommand in ("test", "predict") else None

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["weights_only"] = True
        if kwargs.get("ckpt_path"):
            # As an argument it would be unknown in `setup`, where methods load the weights that they start from.
            self.trainer.ckpt_path = kwargs.pop("ckpt_path")
        if subcommand in ("validate", "test") and self._classifies:
            kwargs["verbose"] = False  # the evaluation prints its own table
        return kwargs

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            RunFolder(Path(self.trainer.default_root_dir)).note(hardware=hardware(self.trainer.strategy.root_device))
            best = Path(self.trainer.default_root_dir, "checkpoints", "best.ckpt")
            print(f"Run folder: {_shown(self.trainer.default_root_dir)}")
            if best.is_file():
                print(f"Test it with: robust-pl test --ckpt_path {_shown(best)}")

    def after_test(self) -> None:
        if not isinstance(self.datamodule, ImageDataModule):
            return
        with others_wait(self.trainer):
            if self.trainer.is_global_zero:
                self._report()

    def _report(self) -> None:
        from .evaluation.reporting import report_test

        device = self.trainer.strategy.root_device
        flags = self._get(self.config_init, "report").flags
        self.model.to(device)
        for track in self.evaluation.tracks:
            if track.folder is not None:
                # A logger has room for one report, that of the raw weights.
                loggers = self.trainer.loggers if track.average is None else []
                with track.applied(self.model):
                    path = report_test(track.folder, self.model, self.datamodule, flags, device, hardware(device), loggers)
                print(f"Report: {_shown(path)}")

    def _named_attacks(self) -> list[Attack]:
        everywhere = self._get(self.config_init, "attacks") or {}
        in_validation = self._get(self.config_init, "val_attacks")
        for attack in everywhere.values():
            attack.stages = ("validate", "test", "predict") if in_validation is None else ("test", "predict")
        for attack in (in_validation or {}).values():
            attack.stages = ("validate",)
        for attacks in (everywhere, in_validation or {}):
            check_names(list(attacks))
            for name, attack in attacks.items():
                attack.name = name
        return [*everywhere.values(), *(in_validation or {}).values()]

    def _run_folder(self, config: Any) -> RunFolder:
        settings = config.run
        found = RunFolder.of_checkpoint(config.ckpt_path)
        if found is not None and (self.subcommand != "fit" or settings.name in (None, found.record().get("name"))):
            return found
        named = [Path(file).stem for file in configs_in(sys.argv[1:])]
        name = settings.name or next(iter(named), None) or config.model.class_path.rsplit(".", 1)[-1].lower()
        if self.subcommand in ("test", "predict") and "LOCAL_RANK" not in os.environ:
            begun = RunFolder.of_evaluation(settings.output_dir, name, self.subcommand, self.request)
            if begun is not None:
                return begun
        return RunFolder.create(settings.output_dir, name, {"name": name, "seed": config.seed_everything})

    def _checkpoints(self, run: RunFolder, config: Any, settings: dict[str, Any], attacks: list[Attack]) -> list[Callback]:
        if settings.get("enable_checkpointing") is False or settings.get("fast_dev_run"):
            return []
        folder = run.path / "checkpoints"
        if not self._classifies:
            monitor = config.run.monitor or getattr(self.model, "monitor", None)
            return [*([BestCheckpoint(folder, monitor)] if monitor else []), *self._last_checkpoints(folder, config)]
        names = [attack.name for attack in attacks if "validate" in attack.stages]
        adds = type(self.model).configure_callbacks is not Method.configure_callbacks
        own = settings.get("callbacks") or ()
        monitor = choose_monitor(config.run.monitor, names, own, adds, self.evaluation.averages)
        return [BestCheckpoint(folder, monitor), *self._last_checkpoints(folder, config)]

    @staticmethod
    def _last_checkpoints(folder: Path, config: Any) -> list[Callback]:
        every, epochs = config.run.save_every_n_steps, config.run.save_every_n_epochs
        return [LastCheckpoint(folder, every_n_epochs=epochs), *([] if every is None else [LastCheckpoint(folder, every)])]

    def _loggers(self, run: RunFolder, config: dict[str, Any]) -> list[Logger]:
        settings = config["run"]
        record = run.record()
        loggers: list[Logger] = [CSVLogger(run.path, "metrics")]
        if os.environ.get("WANDB_MODE") != "disabled":
            loggers.append(self._wandb(run, record, settings))
        for logger in loggers:
            logger.log_hyperparams({"command": self.subcommand, "config": config, "versions": versions()})
        return loggers

    @staticmethod
    def _wandb(run: RunFolder, record: dict[str, Any], settings: dict[str, Any]) -> WandbLogger:
        wandb = WandbLogger(
            name=record.get("name", run.path.name),
            save_dir=str(run.path),
            id=record.get("wandb_id"),
            project=settings["project"],
            offline=os.environ.get("WANDB_MODE", "offline") != "online",
            resume="allow",
            group=settings["group"],
            tags=settings["tags"] or None,
        )
        wandb._wandb_init.pop("anonymous", None)  # wandb warns of it although it is None
        return wandb


@rank_zero_only
def _write_config(folder: Path, subcommand: str, config: dict[str, Any]) -> None:
    """``config.yaml`` of the fit; later commands add ``config-test.yaml`` and so on."""
    stem = "config" if subcommand == "fit" else f"config-{subcommand}"
    number, path = 1, folder / f"{stem}.yaml"
    text = yaml.safe_dump(config, sort_keys=False)
    while path.exists() and path.read_text() != text:
        number += 1
        path = folder / f"{stem}-{number}.yaml"
    path.write_text(text)


def _shown(path: str | Path) -> str:
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in str(record.msg)
