"""The command line: ``robust-pl fit | validate | test | predict | audit | report | turntable``, and ``python -m robust_pl``."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

from ._quick import quickly
from .cli_help import COMMANDS, RUNS, configs_in, mistake, show_help

# Where a run was trained says nothing about where its checkpoint is tested.
_HARDWARE = ("accelerator", "devices", "num_nodes", "strategy", "plugins", "default_root_dir")

_GONE = re.compile(r"gloo/transport\S*\] .*(closed|reset) by peer|Connection was likely closed")  # as gloo and the store say it
_WORKER = re.compile(r"DataLoader worker \(pid.*\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line. Ends the process with 2 and one line where the input is wrong, and with 1 where another one died.

    Set ``ROBUST_PL_TRACEBACK=1`` to see where an error came from.

    Args:
        args: command-line arguments; None takes those of the process.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["--version"]:
        from . import __version__

        print(f"robust-pl {__version__}")
        return
    if arguments[:1] in (["-h"], ["--help"]):
        show_help()
        sys.exit(0)
    if wrong := mistake(arguments):
        sys.exit(_complain(wrong))
    # A user's own mymethods.py beside the config can be named as a class path.
    sys.path.insert(0, os.getcwd())
    try:
        _run(arguments)
    except (ValueError, TypeError, OSError, ImportError, *_of_lightning()) as error:
        from .cli_errors import one_line

        if os.environ.get("ROBUST_PL_TRACEBACK"):
            traceback.print_exc()
        sys.exit(_complain(one_line(_sentence(error), arguments) + _place_in_users_code(error)))
    except RuntimeError as error:
        said = _of_a_process_that_ended(str(error))
        if said is None or os.environ.get("ROBUST_PL_TRACEBACK"):
            raise
        _complain(said)
        sys.exit(1)


def _of_lightning() -> tuple[type[Exception], ...]:
    """Lightning's own error, if Lightning is there to raise it; to import it for that would take seconds."""
    module = sys.modules.get("lightning.fabric.utilities.exceptions")
    return () if module is None else (module.MisconfigurationException,)


def _run(arguments: list[str]) -> None:
    if arguments[0] in COMMANDS:
        from . import commands

        return getattr(commands, arguments[0])(arguments[1:])
    from .trust import guarded, named_by, read_checkpoint, stored_config

    from_checkpoint = _value_of(arguments, "--ckpt_path")
    if not from_checkpoint or arguments[0] not in RUNS:
        return _start(arguments)
    checkpoint = read_checkpoint(from_checkpoint)
    if "pytorch-lightning_version" not in checkpoint:
        raise ValueError(
            f"ckpt_path={from_checkpoint} holds weights and no training run: start from it with --model.init_args.weights"
        )
    if any(configs_in(arguments)):
        return _start(arguments)
    named = named_by(arguments)
    _import_lightning()  # or the look at the classes that the config names would do it, and slowly
    config = stored_config(checkpoint, from_checkpoint, named)
    del checkpoint  # it holds all weights once more
    if arguments[0] != "fit":
        config["trainer"] = {k: v for k, v in config.get("trainer", {}).items() if k not in _HARDWARE}
    import yaml

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / _name_of(from_checkpoint)
        path.write_text(yaml.safe_dump(config))
        with guarded(named):
            return _start([arguments[0], "--config", str(path), *arguments[1:]])


def _name_of(checkpoint: str) -> str:
    """A run made from a checkpoint outside of any run is named after it."""
    return f"{Path(checkpoint).stem}.yaml"


def _start(arguments: list[str]) -> None:
    _import_lightning()
    from .lightning_cli import RobustCLI
    from .run_folder import RunFolder

    child = "LOCAL_RANK" in os.environ
    try:
        RobustCLI.start(arguments)
    finally:
        if not child:
            RunFolder.forget()
            os.environ.pop("LOCAL_RANK", None)  # which Lightning leaves behind


def _import_lightning() -> None:
    with quickly("lightning.pytorch"):
        from . import lightning_cli as lightning_cli


def _value_of(arguments: Sequence[str], option: str) -> str | None:
    """What the command line gives for an option, as ``--option value`` or ``--option=value``."""
    for here, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if here == option:
            return following
        if here.startswith(option + "="):
            return here.partition("=")[2]
    return None


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        remedy = {
            "ENOSPC": "free some space or choose another --run.output_dir; what was saved before is intact",
            "EACCES": "choose a folder that you may write to, with --run.output_dir",
            "EROFS": "choose a folder that you may write to, with --run.output_dir",
            "ENOTDIR": "a file stands where a folder should be; choose another --run.output_dir",
            "EEXIST": "a file stands where a folder should be; choose another --run.output_dir",
        }
        import errno

        hint = remedy.get(errno.errorcode.get(error.errno or 0, ""), "")
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}" + (f": {hint}" if hint else "")
    return str(error) or type(error).__name__


def _place_in_users_code(error: Exception) -> str:
    """Where in the user's own file it happened, if it happened below one."""
    ours = Path(__file__).resolve().parent
    library = (str(ours), str(ours.parent / "callbacks"), sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"))
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.endswith(".py") and not frame.filename.startswith(library):
            return f" (in {os.path.relpath(frame.filename)}, line {frame.lineno}; ROBUST_PL_TRACEBACK=1 shows the way there)"
    return ""


def _of_a_process_that_ended(message: str) -> str | None:
    """A sentence instead of a message about a process that this one waited for; None if it is of something else."""
    if _GONE.search(message):  # that one has said why, and a traceback of this one would bury it
        return "another process of this run has ended: see what it said"
    if found := _WORKER.search(message):
        how = f"was killed ({found[1]})" if found[1] else "ended"
        return f"a process that reads data {how}, perhaps for want of memory: set data.init_args.num_workers lower, or to 0"
    return None


def _complain(message: str) -> int:
    print(f"robust-pl: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
