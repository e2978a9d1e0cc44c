"""Persistent buffers: what a model's files hold beside its parameters, such as the corrections of a router
(`e_score_correction_bias` of DeepSeek-V3, GLM-4-MoE, MiniMax-M2) or a scale of each layer (`layer_scalar` of Gemma 4).

No gradient reaches them: they belong to the base and stay as they are. Every rank holds them whole, under every
strategy, in the dtype in which transformers would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..recipes.errors import UserError
from .checkpoint.fragments import Fragment, FragmentReader, TensorSpec
from .checkpoint.layout import DTYPE_OF_TORCH
from .model import BuiltModel
from .persistent import persistent_buffers


def stored_shapes(built: BuiltModel) -> dict[str, tuple[int, ...]]:
    """Of the folder's buffers, by their names there."""
    places = dict(persistent_buffers(built.loss_model))
    return {stored: tuple(places[name].value.shape) for name, stored in built.buffers.items()}


class Buffers:
    """Those of a model that is laid out over `size` ranks, to save and to load."""

    def __init__(self, built: BuiltModel, size: int) -> None:
        self._built, self._size = built, size
        self._places = dict(persistent_buffers(built.loss_model))
        self._seen = self._now()

    def fragments(self) -> Iterator[Fragment]:
        """As `Engine.fragments` of the model has them, behind the parameters."""
        for name, published in self._built.published_buffers().items():
            value = self._places[name].value
            spec = TensorSpec(published, tuple(value.shape), DTYPE_OF_TORCH[str(value.dtype).removeprefix("torch.")])
            ranges = ((0, value.numel()),) if value.numel() else ()
            yield Fragment(spec, ranges, value.flatten(), replicas=self._size)

    def load(self, reader: FragmentReader) -> None:
        """From a checkpoint, by published names."""
        self._load(self._built.published_buffers(), reader)

    def load_base(self, reader: FragmentReader) -> None:
        """From the folder that the run starts from. What is not there stays as the model's own initialisation has it:
        `check_base` has seen to it that this means something."""
        self._load(self._built.buffers, reader)

    def _load(self, names: Mapping[str, str], reader: FragmentReader) -> None:
        there = set(reader.names())
        for name, stored in names.items():
            value = self._places[name].value
            if stored in there:
                value.copy_(reader.read(stored, ((0, value.numel()),)).view(value.shape))
        self._seen = self._now()

    def _now(self) -> dict[str, tuple[Tensor, int]]:
        """The tensors, and how often each was written to."""
        return {name: (place.value, place.value._version) for name, place in self._places.items()}

    def refuse_changes(self) -> None:
        """Whether a forward pass has changed any, as batch normalisation does: by the rows of one rank. What they hold
        would depend on the layout, and files that hold them are not written again. Raises UserError."""
        now = self._now()
        changed = [
            self._built.buffers[name]
            for name, (value, version) in self._seen.items()
            if now[name][0] is not value or now[name][1] != version
        ]
        if changed:
            raise UserError(
                f"model.path: models of type {self._built.config.model_type!r} change buffers while they are trained "
                f"({', '.join(changed[:3])}), each rank by the rows that it sees. Such models cannot be trained."
            )
