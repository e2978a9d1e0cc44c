"""Commands about checkpoints of other programs, and for them. Parsing only, as in `cli.py`."""

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


def import_checkpoint(
    source: str,
    /,
    *,
    to: str,
    base: str | None = None,
    dtype: Literal["bfloat16", "float32", "float16"] | None = None,
    training: bool = False,
    overwrite: bool = False,
) -> int:
    """Turn a checkpoint of DeepSpeed, of torch.distributed.checkpoint, or pickled weights into one of ours.

    Parameters
    ----------
    source
        A folder on this machine: DeepSpeed's (any ZeRO stage), DCP's (`.metadata`), the Trainer's `checkpoint-N` with
        either of them, or one with `pytorch_model.bin`. Nothing that its files hold is run.
    to
        An empty or new folder or URL. The same import, broken off earlier, goes on.
    base
        Whose config.json and tokenizer: a hub id, a folder or a URL; by default those beside SOURCE.
    dtype
        Of the weights; by default the one that the model computed in, or as they are stored.
    training
        Keep AdamW's moments and fp32 weights too, for model.keep_optimizer_state.
    overwrite
        Replace an earlier import that lies there (and nothing else).
    """
    from .import_checkpoint import Wanted
    from .import_checkpoint import import_checkpoint as import_foreign

    return import_foreign(source, to, Wanted(base, dtype, training, overwrite))
