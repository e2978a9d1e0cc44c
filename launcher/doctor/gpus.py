"""What `nvidia-smi -q -x` and the kernel's log say of GPUs. Pure.

Names of elements differ between drivers: what is meant by one name in one of them is looked for by what its name
contains. Which Xids mean a broken GPU: NVIDIA's "XID Errors"; the others are most often a program's mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from xml.etree import ElementTree

XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)(?:, (.*))?")

FATAL_XIDS = {
    48: "a double-bit ECC error",
    62: "an internal halt of its microcontroller",
    64: "rows of memory that could not be remapped",
    74: "an NVLink error",
    79: "it has fallen off the bus",
    95: "an uncontained ECC error",
    119: "its system processor does not answer",
    120: "an error of its system processor",
    140: "an unrecovered ECC error",
    143: "it failed to initialise",
}
"""The node needs a reset or a repair."""

WORN_XIDS = {63: "rows of memory were remapped", 92: "many corrected ECC errors", 94: "a contained ECC error"}
"""It goes on, and is worth a look."""


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node. `faults` make it unfit; `remarks` do not."""

    name: str
    uuid: str
    faults: tuple[str, ...]
    remarks: tuple[str, ...]


def parse_smi(text: str) -> list[Gpu]:
    """The GPUs of a node. Raises ValueError for what is no such XML."""
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 - the driver's own tool wrote it, on the node
    except ElementTree.ParseError as error:
        raise ValueError(f"nvidia-smi did not print XML: {error}") from error
    return [_gpu(element) for element in root.iter("gpu")]


def _gpu(element: ElementTree.Element) -> Gpu:
    return Gpu(
        name=element.findtext("product_name", "GPU"),
        uuid=element.findtext("uuid", ""),
        faults=tuple(_faults(element)),
        remarks=tuple(_remarks(element)),
    )


def _faults(gpu: ElementTree.Element) -> Iterator[str]:
    if errors := sum(_numbers(gpu.find("ecc_errors/volatile"))):
        yield f"{errors} uncorrectable ECC errors since the driver was loaded"
    if _is(gpu.findtext("ecc_errors/aggregate/sram_threshold_exceeded")):
        yield "its SRAM has had more ECC errors than it may"
    if _is(gpu.findtext("remapped_rows/remapped_row_failure")):
        yield "rows of memory could not be remapped"
    pending = (gpu.findtext("remapped_rows/remapped_row_pending"), gpu.findtext("retired_pages/pending_retirement"))
    if any(map(_is, pending)):
        yield "memory waits to be remapped: reset it"
    if (action := gpu.findtext("gpu_recovery_action", "None")) not in ("None", "N/A"):
        yield f"the driver asks for: {action}"


def _numbers(errors: ElementTree.Element | None) -> Iterator[int]:
    """Counts of errors that could not be corrected."""
    if errors is None:
        return
    for each in errors.iter():
        is_meant = "uncorrectable" in each.tag or each.tag == "double_bit"
        text = each.findtext("total", "") if each.tag == "double_bit" else each.text or ""
        if is_meant and text.strip().isdigit():
            yield int(text)


def _remarks(gpu: ElementTree.Element) -> Iterator[str]:
    for each in gpu.iter():
        if "hw_thermal_slowdown" in each.tag and (each.text or "").strip() == "Active":
            yield "it is slowed down because of its heat"
        if "hw_power_brake_slowdown" in each.tag and (each.text or "").strip() == "Active":
            yield "it is slowed down because of its power supply"


def _is(text: str | None) -> bool:
    return (text or "").strip() == "Yes"


def parse_xids(kernel_log: str) -> tuple[list[str], list[str]]:
    """(faults, remarks) of a kernel's log since the node was booted, each said once."""
    faults: dict[str, None] = {}
    remarks: dict[str, None] = {}
    for place, number, _ in XID.findall(kernel_log):
        code = int(number)
        if code in FATAL_XIDS:
            faults[f"Xid {code} of the GPU at {place}: {FATAL_XIDS[code]}"] = None
        elif code in WORN_XIDS:
            remarks[f"Xid {code} of the GPU at {place}: {WORN_XIDS[code]}"] = None
    return list(faults), list(remarks)
