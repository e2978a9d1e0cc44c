"""DeepSpeed's own checkpoints, of any ZeRO stage: `global_stepN` with a file of each rank.

Layouts (read in 0.19.8, `utils/zero_to_fp32.py`). ZeRO-1 and 2: the tensors of a parameter group lie one behind the
other in one flat fp32 tensor, perhaps with padding behind each, which is cut evenly over ranks. ZeRO-3: every tensor is
cut evenly over ranks, the last part padded, and a rank's parts lie one behind the other. Moments lie as the weights do.
The optimizer of ZeRO-1 in bfloat16 (`BF16_Optimizer`) is a class of its own, which `zero_to_fp32` does not read: its
files have the layout of ZeRO-2 and do not say a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from ...recipes.errors import UserError
from ..checkpoint.fragments import TensorSpec
from ..pickles import Inert, load_pickled
from .base import MOMENTS, Foreign, MappedTensors, Moments, Piece, missing_elements, stored_dtype
from .deepspeed_files import DeepspeedFiles, check_ranks, find_files

State = Mapping[str, Any]

LEFT_BEHIND = {
    "lr_scheduler": "the learning rate's schedule",
    "data_sampler": "the data sampler's place",
    "random_ltd": "random-LTD's schedule",
    "loss_scaler": "the loss scale",
}
"""Keys of DeepSpeed's states -> what they are, in words."""

KNOWN = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "checkpoint_parallel_dimensions",
        "sparse_tensor_module_names",
    }
)
"""Keys that DeepSpeed itself writes into model states; all others are its user's."""


def find(folder: Path) -> Foreign | None:
    """See `base.py`."""
    files = find_files(folder)
    try:
        return None if files is None else _open(files)
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(
            f"{folder}: its files are not as DeepSpeed 0.19 writes them ({error!r}): of a version that is not known "
            "here, or damaged."
        ) from error


def _open(files: DeepspeedFiles) -> Foreign:
    model = _load_states(files.model[0], "module")
    _refuse_models(files.folder, model)
    if not files.optimizer:
        return _without_zero(files, model)
    saved = _Saved.load(files, model)
    weights, moments, why = saved.weights(), None, ""
    try:
        moments = saved.moments()
    except _NoMoments as error:
        why = str(error)
    stage = f"ZeRO-{saved.stage}" if saved.stage else "ZeRO-1 in bfloat16"
    ranks = f"{saved.size} rank{'s' * (saved.size > 1)}"
    what = f"DeepSpeed {stage} checkpoint of {ranks}, step {_step(model)}, in {files.folder}"
    return Foreign(what, weights, _computed_in(model), _step(model), moments, why, _left_behind(model, saved.states[0]))


def _load_states(path: Path, key: str) -> State:
    states = load_pickled(path)
    if not isinstance(states, dict) or key not in states:
        raise UserError(f"{path} is no file of a DeepSpeed checkpoint: it has no {key!r}.")
    return states


def _refuse_models(folder: Path, model: State) -> None:
    if (cut := model.get("mp_world_size") or 1) != 1:
        raise UserError(f"{folder} was saved under tensor parallelism ({cut} ranks), which cannot be imported.")
    if model.get("ds_autoep_layers") or model.get("autoep_layers"):
        raise UserError(f"{folder} was saved under expert parallelism, which cannot be imported.")


def _step(model: State) -> int:
    return int(model.get("global_steps") or 0)


def _without_zero(files: DeepspeedFiles, model: State) -> Foreign:
    """Everything is in one file; the optimizer calls its tensors by number."""
    if model.get("param_shapes") is not None:
        raise UserError(
            f"{files.folder}: *_optim_states.pt are missing, of every rank. Copy the checkpoint again, whole."
        )
    tensors = {name: value for name, value in model["module"].items() if isinstance(value, torch.Tensor)}
    what = f"DeepSpeed checkpoint without ZeRO, step {_step(model)}, in {files.folder}"
    why = "without ZeRO the optimizer calls its tensors by number, and nothing says which is which"
    return Foreign(
        what, MappedTensors.whole(tensors), _computed_in(model), _step(model), None, why, _left_behind(model, {})
    )


def _computed_in(model: State) -> str | None:
    """The dtype of the module's parameters; of ZeRO-3 that of their empty placeholders."""
    shapes = model.get("param_shapes") or []
    trained = [name for group in shapes for name in group] or list(model["module"])
    dtypes = {model["module"][name].dtype for name in trained if name in model["module"]}
    return str(dtypes.pop()).removeprefix("torch.") if len(dtypes) == 1 else None


def _left_behind(model: State, optimizer: State) -> tuple[str, ...]:
    held = [what for key, what in LEFT_BEHIND.items() if model.get(key) is not None or optimizer.get(key) is not None]
    own = sorted(str(key) for key in model.keys() - KNOWN - LEFT_BEHIND.keys())
    return (*held, *((f"what the program added ({', '.join(own[:5])})",) if own else ()))


class _NoMoments(Exception):
    """Why the optimizer's state cannot be kept."""


@dataclass(frozen=True)
class _Saved:
    """A checkpoint's loaded (mapped) states; `states` are the optimizer's, by rank. `stage` 0: not said."""

    files: DeepspeedFiles
    model: State
    states: Sequence[State]
    stage: int

    @classmethod
    def load(cls, files: DeepspeedFiles, model: State) -> _Saved:
        """Raises UserError for files that are missing or not of one checkpoint."""
        first = _load_states(files.optimizer[0], "optimizer_state_dict")["optimizer_state_dict"]
        stage, size = _stage(first), _ranks(files.folder, first)
        check_ranks(files, size, stage)
        states = [_load_states(path, "optimizer_state_dict")["optimizer_state_dict"] for path in files.optimizer]
        if {(_stage(state), _ranks(files.folder, state)) for state in states} != {(stage, size)}:
            raise UserError(f"{files.folder}: its ranks' files are of different checkpoints. Copy it again, whole.")
        if "ds_zero_partition_groups" in first:
            raise UserError(f"{files.folder} was saved with experts in groups of their own, which cannot be imported.")
        return cls(files, model, states, stage)

    @property
    def size(self) -> int:
        """Ranks that saved it."""
        return len(self.states)

    @cached_property
    def groups(self) -> Sequence[Mapping[str, tuple[int, ...]]]:
        """Of each parameter group the names, in the order in which they lie, and the shapes."""
        return [{name: tuple(shape) for name, shape in group.items()} for group in self.model["param_shapes"]]

    def weights(self) -> MappedTensors:
        """fp32 of what was trained; what was frozen, and buffers, as the model held them."""
        key = "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        trained = self._tensors([state[key] for state in self.states], "the weights")
        held = {**self._frozen(), **trained.pieces}
        specs = {name: trained.specs.get(name) or _spec(name, self._shape(name), held[name]) for name in held}
        return self._complete(MappedTensors(specs, held))

    def _shape(self, name: str) -> tuple[int, ...]:
        frozen = self.model.get("frozen_param_shapes") or {}
        return tuple(frozen[name]) if name in frozen else tuple(self.model["module"][name].shape)

    def _frozen(self) -> dict[str, Sequence[Piece]]:
        """Whole in the module, but for ZeRO-3, which keeps each rank's part beside it."""
        trained = {name for group in self.groups for name in group}
        module = {name: v for name, v in self.model["module"].items() if isinstance(v, torch.Tensor)}
        whole = set(self.model.get("buffer_names") or ()) if self.stage == 3 else module.keys() - trained
        pieces: dict[str, Sequence[Piece]] = {name: [Piece(0, module[name])] for name in module if name in whole}
        if self.stage == 3 and self.model.get("frozen_param_shapes"):
            models = [self.model, *(_load_states(path, "module") for path in self.files.model[1:])]
            parts = [model["frozen_param_fragments"] for model in models]
            for name, shape in self.model["frozen_param_shapes"].items():
                pieces[name] = list(_of_ranks([part[name].reshape(-1) for part in parts], math.prod(shape)))
        return pieces

    def moments(self) -> Moments:
        """AdamW's. Raises _NoMoments for any other optimizer."""
        kept = [list(_state_of_groups(state, self.stage)) for state in self.states]
        names = {key for groups in kept for group in groups for key in group if key != "step"}
        if not names:
            raise _NoMoments("no step had been taken")
        if names != set(MOMENTS):
            raise _NoMoments(f"its optimizer keeps {', '.join(sorted(names))}, which is not AdamW's state")
        readers = {
            moment: self._complete(self._tensors([[group[moment] for group in groups] for groups in kept], moment))
            for moment in MOMENTS
        }
        return Moments(readers, self._updates(kept))

    def _updates(self, kept: Sequence[Sequence[State]]) -> float:
        said = {float(group["step"]) for groups in kept for group in groups if "step" in group}
        said = said or {float(step) for state in self.states for step in _steps_beside(state, self.stage)}
        if len(said) != 1:
            raise _NoMoments(f"its tensors were updated different numbers of times ({sorted(said)})")
        return said.pop()

    def _tensors(self, flat: Sequence[Sequence[torch.Tensor]], what: str) -> MappedTensors:
        """The trained tensors, of which `flat[rank]` holds the parts."""
        if self.stage == 3:
            found = self._of_stage_3(flat)
        else:
            if {len(groups) for groups in flat} != {len(self.groups)}:
                raise UserError(
                    f"{self.files.folder}: {what} have other parameter groups than the model. It is damaged."
                )
            found = {name: parts for number in range(len(self.groups)) for name, parts in self._of_group(number, flat)}
        shapes = {name: shape for group in self.groups for name, shape in group.items()}
        return MappedTensors({name: _spec(name, shapes[name], found[name]) for name in shapes}, found)

    def _of_group(self, number: int, flat: Sequence[Sequence[torch.Tensor]]) -> Iterator[tuple[str, Sequence[Piece]]]:
        shapes = self.groups[number]
        paddings = (self.states[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
        whole = _Joined([groups[number] for groups in flat])
        begin = 0
        for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
            stop = begin + math.prod(shape)
            yield name, list(whole.pieces(begin, stop))
            begin = stop + int(padding)

    def _of_stage_3(self, flat: Sequence[Sequence[torch.Tensor]]) -> dict[str, Sequence[Piece]]:
        ranks = [_Joined(groups) for groups in flat]
        found: dict[str, Sequence[Piece]] = {}
        begin = 0
        for name, shape in ((name, shape) for group in self.groups for name, shape in group.items()):
            numel = math.prod(shape)
            part = -(-numel // self.size)
            found[name] = [
                Piece(rank * part + at, values)
                for rank, joined in enumerate(ranks)
                for at, values in joined.pieces(begin, begin + min(part, max(0, numel - rank * part)))
            ]
            begin += part
        return found

    def _complete(self, tensors: MappedTensors) -> MappedTensors:
        lost = missing_elements(tensors)
        if lost:
            raise UserError(
                f"{self.files.folder}: its files hold too few elements of {len(lost)} tensors ({', '.join(lost[:3])}). "
                "They are of different checkpoints, or damaged. Copy it again, whole."
            )
        return tensors


class _Joined:
    """Flat tensors as one."""

    def __init__(self, parts: Sequence[torch.Tensor]) -> None:
        self._parts = [part.detach().reshape(-1) for part in parts]
        self._begins = list(accumulate((len(part) for part in self._parts), initial=0))

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """Elements [start, stop), counted from `start`."""
        for begin, part in zip(self._begins, self._parts, strict=False):
            low, high = max(start, begin), min(stop, begin + len(part))
            if low < high:
                yield Piece(low - start, part[low - begin : high - begin])


def _of_ranks(parts: Sequence[torch.Tensor], numel: int) -> Iterator[Piece]:
    """Equal parts, the last ones padded."""
    yield from _Joined(parts).pieces(0, numel)


def _spec(name: str, shape: tuple[int, ...], pieces: Sequence[Piece]) -> TensorSpec:
    dtype = pieces[0].values.dtype if pieces else torch.float32
    return TensorSpec(name, shape, stored_dtype(dtype))


def _stage(state: State) -> int:
    said = state.get("zero_stage", 0)
    return int(said.args[0]) if isinstance(said, Inert) else int(said)


def _ranks(folder: Path, state: State) -> int:
    count = state["partition_count"]
    counts = set(count) if isinstance(count, (list, tuple)) else {count}
    if len(counts) != 1:
        raise UserError(
            f"{folder}: its parameter groups were cut over different numbers of ranks; it cannot be imported."
        )
    return int(counts.pop())


def _state_of_groups(state: State, stage: int) -> Iterator[State]:
    """The optimizer's state of each flat tensor, in their order, without scalars but `step`."""
    base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if isinstance(base, list):  # `elastic_checkpoint`
        held = base
    else:
        numbers = [number for group in base["param_groups"] for number in group["params"]]
        held = [base["state"].get(number, {}) for number in numbers]
    for group in held:
        yield {key: value for key, value in group.items() if key == "step" or _is_wide(value)}


def _is_wide(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0


def _steps_beside(state: State, stage: int) -> Iterator[float]:
    """Where fused optimizers count: in their parameter groups."""
    base = state["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
    if isinstance(base, list):
        yield state.get("base_optimizer_state_step", 0)
    else:
        yield from (group["step"] for group in base["param_groups"] if "step" in group)
