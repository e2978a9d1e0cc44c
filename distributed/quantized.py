"""QLoRA's base: frozen weights of linear layers in 4 bits (NF4; Dettmers et al. 2023, arXiv:2305.14314, section 3),
quantised and dequantised by bitsandbytes.

Blocks of 64 lie within rows, each with a scale in fp32, and a row is stored as its codes followed by its scales: so
any rows of a weight can be quantised and moved by themselves, by a rank that has read no others. For row lengths that
64 divides the values are those of bitsandbytes and transformers (`load_in_4bit`, `nf4`, no double quantisation); other
rows end in a block that is padded with zeros. Strategies see a frozen parameter of the compute dtype, whose bits are
codes.

Shapes: weight [O, I] (outputs, inputs), stored as [O, row_bytes(I) / itemsize].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..recipes.errors import UserError
from .adapter import is_inside_adapter
from .checkpoint.exchange import Range
from .checkpoint.fragments import FragmentReader, TensorSpec

BLOCK = 64
CODE_BYTES = BLOCK // 2
SCALE_BYTES = 4
STORED_DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}


class Packing(NamedTuple):
    """A weight [rows, columns] that is stored in 4 bits, by elements of `dtype`."""

    rows: int
    columns: int
    dtype: torch.dtype

    @property
    def blocks(self) -> int:
        """Per row."""
        return -(-self.columns // BLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        """As it is stored."""
        return self.rows, self.blocks * (CODE_BYTES + SCALE_BYTES) // self.dtype.itemsize


def pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows [R, I] of a weight, rounded to `dtype`, as the model has it otherwise, and quantised: [R, packed]."""
    from bitsandbytes.functional import quantize_4bit

    packing = Packing(weight.shape[0], weight.shape[1], dtype)
    padded = F.pad(weight.to(dtype).float(), (0, packing.blocks * BLOCK - packing.columns)).contiguous()
    codes, state = quantize_4bit(padded, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    scales = state.absmax.float().view(packing.rows, packing.blocks).contiguous()
    row = torch.cat([codes.view(torch.uint8).view(packing.rows, -1), scales.view(torch.uint8)], dim=1)
    return row.contiguous().view(dtype)


def unpack(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The weight [O, I] again, as the codes have it."""
    rows = packed.shape[0]
    raw = packed.view(torch.uint8)
    num_blocks = -(-columns // BLOCK)
    codes = raw[:, : num_blocks * CODE_BYTES].contiguous().view(-1, 1)
    scales = raw[:, num_blocks * CODE_BYTES :].contiguous().view(torch.float32).flatten()
    whole: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        codes, scales, BLOCK, "nf4", [rows, num_blocks * BLOCK], dtype
    )
    return whole[:, :columns]


class _Linear4bit(torch.autograd.Function):
    """x W^T with W dequantised for the pass and again for the backward pass, so that it is never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, columns: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.columns = columns
        return F.linear(x, unpack(packed, columns, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ unpack(packed, ctx.columns, gradients[0].dtype), None, None


class Linear4bit(nn.Module):
    """A frozen linear layer whose weight is held in 4 bits. Its bias stays as it is."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packing = Packing(linear.out_features, linear.in_features, dtype)
        memory = torch.empty(self.packing.shape, dtype=dtype, device=linear.weight.device)
        self.weight = nn.Parameter(memory, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Linear4bit.apply(x, self.weight, self.in_features)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result + self.bias.to(result.dtype)


def quantize_base(adapted: Any, causal_lm: Any, dtype: torch.dtype) -> None:
    """Replace the frozen linear layers of an adapted model, all but the head. Raises UserError where the library or
    such layers are missing."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"adapter.type: qlora needs bitsandbytes, which cannot be imported here ({error}): "
            "pip install 'ftlaunch[quantized]'. Or take type: lora."
        ) from error
    head = {id(module) for module in causal_lm.get_output_embeddings().modules()}
    found = [
        (name, module)
        for name, module in adapted.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in head and not is_inside_adapter(name)
    ]
    if not found:
        raise UserError(
            "adapter.type: this model has no linear layers that qlora could hold in 4 bits. Take type: lora."
        )
    for name, module in found:
        parent, _, child = name.rpartition(".")
        setattr(adapted.get_submodule(parent), child, Linear4bit(module, dtype))


def packings(model: nn.Module) -> dict[str, Packing]:
    """By parameter name, the weights that are held in 4 bits."""
    modules = model.named_modules()
    return {f"{name}.weight": module.packing for name, module in modules if isinstance(module, Linear4bit)}


class QuantizingReader:
    """A `FragmentReader` of a model folder that gives some weights in 4 bits. `packed`: by their stored names. What was
    asked for is quantised on `device`, a few rows more where it ends within a row."""

    def __init__(self, reader: FragmentReader, packed: Mapping[str, Packing], device: str) -> None:
        self._reader, self._packed, self._device = reader, packed, device

    def names(self) -> Sequence[str]:
        """Names of the stored tensors."""
        return self._reader.names()

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype as they are read here; of a weight with another shape in the files, that one."""
        stored, packing = self._reader.spec(name), self._packed.get(name)
        if packing is None or stored.shape != (packing.rows, packing.columns):
            return stored
        return TensorSpec(name, packing.shape, STORED_DTYPES[packing.dtype])

    def read(self, name: str, ranges: Sequence[Range]) -> Tensor:
        """The elements of these ranges, one after the other."""
        packing = self._packed.get(name)
        if packing is None:
            return self._reader.read(name, ranges)
        return torch.cat([self._read(name, packing, *one) for one in ranges])

    def _read(self, name: str, packing: Packing, start: int, stop: int) -> Tensor:
        width = packing.shape[1]
        first, last = start // width, -(-stop // width)
        values = self._reader.read(name, ((first * packing.columns, last * packing.columns),))
        rows = pack(values.view(-1, packing.columns).to(self._device), packing.dtype).cpu()
        return rows.flatten()[start - first * width : stop - first * width]
