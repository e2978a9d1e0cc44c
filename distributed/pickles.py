"""Files that `torch.save` wrote, opened without running anything that they hold.

A pickle is a program: opened as usual it may do whatever its writer liked. `weights_only` is torch's own reader of a
few harmless instructions; what else DeepSpeed and its users put beside tensors becomes an `Inert` here, whose class is
never looked up, and any other name is refused. Tensors are mapped: their bytes are read when they are used.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..recipes.errors import UserError


class Inert:
    """Stands for an object whose class is not loaded: keeps what it was made of (`args`) and what it held (`state`),
    and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *_args: Any) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__.get("state")
        if isinstance(state, dict) and name in state:
            return state[name]
        raise AttributeError(name)


INERT = (
    "argparse.Namespace",  # what Megatron and its kin keep of their command line
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes that DeepSpeed's checkpoints name, none of which is loaded."""

LEGACY = "it is in torch's format of before 1.6, which cannot be mapped"

REMEDY = (
    "Only tensors and plain values are read. If you trust where it comes from, convert it to safetensors with the "
    "program that wrote it, somewhere you can lose"
)


def load_pickled(path: Path) -> Any:
    """The content of a file, its tensors mapped. Raises UserError for one that is truncated or something else, and for
    one that names anything but tensors, plain values and `INERT`: nothing of that is run."""
    with torch.serialization.safe_globals([(Inert, name) for name in INERT]):
        try:
            _refuse_names(path)
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(f"{path} is refused: {str(error).splitlines()[0]} {REMEDY}.") from error
        except FileNotFoundError as error:
            raise UserError(f"{path} is not there.") from error
        except (RuntimeError, ValueError, EOFError, KeyError, OSError) as error:
            raise UserError(f"{path} cannot be read: {_reason(path, error)}. Copy it again, whole.") from error


def _refuse_names(path: Path) -> None:
    """torch's refusal names the first; here are all of them, found without running anything either."""
    with path.open("rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
    if is_archive and (names := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))):
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UserError(f"{path} is refused, and nothing of it was run: it names {listed}. {REMEDY}.")


def _reason(path: Path, error: Exception) -> str:
    if "mmap can only be used" in str(error):
        return LEGACY if path.stat().st_size else "it is empty"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"it is truncated, or no file of torch.save ({text[:160]})"
