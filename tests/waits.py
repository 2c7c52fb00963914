"""Where code makes a GPU wait: on the CPU by the operations whose result the host must see, on CUDA by what torch says."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
# A value, or a shape that depends on values; and decompositions, which ask whether they converged.
READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount", "_linalg_check_errors")
READ_ENDINGS = ("unique", "unique2", "unique_dim", "unique_consecutive", "_linalg_svd", "_linalg_eigh", "linalg_eig")
# What only copies on the CPU, or reads there past the operations.
COPIES = (Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__)


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen
        self.checks = False

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        name = function.overloadpacket.__name__
        reads = name in READS or name.endswith(READ_ENDINGS) or _by_mask(name, arguments)
        reads |= name == "repeat_interleave" and named.get("output_size") is None
        if reads and not self.checks:
            note(self.seen, name)
        return function(*arguments, **named)


def _by_mask(name: str, arguments: Any) -> bool:
    """Whether samples are picked by a mask, which has to be counted; a single value is filled in without that."""
    if name not in ("index", "index_put", "index_put_", "_unsafe_index"):
        return False
    masks = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in arguments[1])
    return masks and (len(arguments) < 3 or arguments[2].numel() > 1)


class _Functions(TorchFunctionMode):
    def __init__(self, operations: _Operations) -> None:
        super().__init__()
        self.operations = operations

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        # The host's numbers go to the device by a copy that waits for all that was asked for before.
        new = function in (torch.tensor, torch.as_tensor) and not isinstance(arguments[0], Tensor) and named.get("device")
        listed = function in (Tensor.__getitem__, Tensor.__setitem__) and _lists(arguments[1])
        if function in COPIES or new or listed or function is Tensor.new_tensor:
            note(self.operations.seen, function.__name__)
        if function is F.one_hot:  # whose labels are checked on the CPU alone, if the number of classes is given
            self.operations.checks = len(arguments) + len(named) > 1
        try:
            return function(*arguments, **named)
        finally:
            self.operations.checks = False


def _lists(index: Any) -> bool:
    return isinstance(index, list) or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))


@contextmanager
def watching(device: str) -> Iterator[list[str]]:
    """What waits in this context, and where; on ``cpu`` what would wait on a GPU, and on ``cuda`` what did."""
    seen: list[str] = []
    with ExitStack() as undo:
        if device == "cuda":
            undo.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            show = warnings.showwarning

            def noted(message: Any, *where: Any, **more: Any) -> None:
                if "synchronizing CUDA operation" in str(message):
                    note(seen, "cuda")
                else:
                    show(message, *where, **more)

            warnings.showwarning = noted
            undo.callback(torch.cuda.set_sync_debug_mode, torch.cuda.get_sync_debug_mode())
            # Not "error", so that one run finds all.
            torch.cuda.set_sync_debug_mode("warn")
        else:
            operations = undo.enter_context(_Operations(seen))
            undo.enter_context(_Functions(operations))
        yield seen


def note(seen: list[str], what: str) -> None:
    """Write down a wait with the innermost places of the library, or of others where it has no part."""
    stack = [f for f in traceback.extract_stack() if Path(f.filename) != Path(__file__)]
    ours = [f for f in stack if Path(f.filename).is_relative_to(ROOT) and not Path(f.filename).is_relative_to(ROOT / "tests")]
    places = " < ".join(f"{f.name} ({Path(f.filename).name}:{f.lineno})" for f in reversed((ours or stack)[-4:]))
    seen.append(f"{what} in {places}")
