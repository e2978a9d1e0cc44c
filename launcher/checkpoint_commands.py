"""Commands that turn checkpoints into what other programs read. Parsing only, as in `cli.py`."""

from __future__ import annotations

from typing import Literal


def export(
    checkpoint: str,
    /,
    *,
    to: str,
    merge_adapter: bool = False,
    dtype: Literal["bfloat16", "float32", "float16"] | None = None,
    overwrite: bool = False,
    gguf: bool = False,
    gguf_converter: str | None = None,
) -> int:
    """Write a checkpoint as a plain model folder with a card, in little memory, to a folder or a URL.

    Parameters
    ----------
    checkpoint
        RUN, RUN@best, RUN@latest, RUN@STEP, or a checkpoint's folder or URL.
    to
        An empty or new folder or URL. The same export, broken off earlier, goes on.
    merge_adapter
        Merge the adapter into its base: a whole model.
    dtype
        Of the weights; by default as they are stored.
    overwrite
        Replace an earlier export that lies there (and nothing else).
    gguf
        Make a GGUF file besides, with llama.cpp's converter.
    gguf_converter
        llama.cpp's folder, or its convert_hf_to_gguf.py; by default the one on the PATH.
    """
    from .export import Wanted
    from .export import export as export_checkpoint
    from .export_gguf import find_converter

    converter = find_converter(gguf_converter) if gguf or gguf_converter else None
    return export_checkpoint(checkpoint, to, Wanted(merge_adapter, dtype, overwrite, converter))
