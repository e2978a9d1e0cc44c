"""What measurements of nodes mean, and how they are taken; nodes are this process. Real hosts: tests/cluster."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.cluster import host_probe
from ftlaunch.cluster.host_probe import PROBES
from ftlaunch.launcher import cli
from ftlaunch.launcher.doctor import examine as examining
from ftlaunch.launcher.doctor.command import wanted_of
from ftlaunch.launcher.doctor.examine import NodeError, Wanted, examine, rounds
from ftlaunch.launcher.doctor.gpus import parse_smi, parse_xids
from ftlaunch.launcher.doctor.judge import Finding, Measured, judge, unfit
from ftlaunch.recipes.schema_cluster import LocalCluster, SshCluster

# In the layout of `nvidia-smi -q -x` (driver 570), of what is looked at.
SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
	<driver_version>570.86.15</driver_version>
	<attached_gpus>1</attached_gpus>
	<gpu id="00000000:4F:00.0">
		<product_name>NVIDIA H100 80GB HBM3</product_name>
		<uuid>GPU-9f1d6a5c-0a51-4c1c-bb4b-8d6e3b7c2f10</uuid>
		<gpu_recovery_action>None</gpu_recovery_action>
		<clocks_event_reasons>
			<clocks_event_reason_hw_slowdown>Not Active</clocks_event_reason_hw_slowdown>
			<clocks_event_reason_hw_thermal_slowdown>Not Active</clocks_event_reason_hw_thermal_slowdown>
			<clocks_event_reason_hw_power_brake_slowdown>Not Active</clocks_event_reason_hw_power_brake_slowdown>
		</clocks_event_reasons>
		<ecc_mode><current_ecc>Enabled</current_ecc><pending_ecc>Enabled</pending_ecc></ecc_mode>
		<ecc_errors>
			<volatile>
				<sram_correctable>3</sram_correctable>
				<sram_uncorrectable_parity>0</sram_uncorrectable_parity>
				<sram_uncorrectable_secded>0</sram_uncorrectable_secded>
				<dram_correctable>7</dram_correctable>
				<dram_uncorrectable>0</dram_uncorrectable>
			</volatile>
			<aggregate>
				<dram_uncorrectable>12</dram_uncorrectable>
				<sram_threshold_exceeded>No</sram_threshold_exceeded>
			</aggregate>
		</ecc_errors>
		<retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
		<remapped_rows>
			<remapped_row_corr>0</remapped_row_corr>
			<remapped_row_unc>12</remapped_row_unc>
			<remapped_row_pending>No</remapped_row_pending>
			<remapped_row_failure>No</remapped_row_failure>
		</remapped_rows>
	</gpu>
</nvidia_smi_log>
"""

VOLTA = """<nvidia_smi_log><gpu id="00000000:3B:00.0"><product_name>Tesla V100-SXM2-32GB</product_name>
<ecc_errors><volatile>
<single_bit><device_memory>4</device_memory><total>4</total></single_bit>
<double_bit><device_memory>1</device_memory><register_file>1</register_file><total>2</total></double_bit>
</volatile></ecc_errors>
<clocks_throttle_reasons><clocks_throttle_reason_hw_thermal_slowdown>Active</clocks_throttle_reason_hw_thermal_slowdown>
</clocks_throttle_reasons><retired_pages><pending_retirement>Yes</pending_retirement></retired_pages></gpu></nvidia_smi_log>
"""

KERNEL = """\
[ 1203.511] NVRM: Xid (PCI:0000:4f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 1203.514] NVRM: GPU 0000:4f:00.0: GPU has fallen off the bus.
[ 1300.001] NVRM: Xid (PCI:0000:4f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
[ 2001.100] NVRM: Xid (PCI:0000:65:00): 31, pid=79749, name=python, Ch 0000000a, intr 00000000. MMU Fault
[ 2500.777] NVRM: Xid (PCI:0000:65:00): 63, pid=1, name=python, Row remapper: New row (0x1) marked for remapping
"""


def test_a_healthy_gpu_and_corrected_errors_are_no_fault():
    [gpu] = parse_smi(SMI)
    assert gpu.name == "NVIDIA H100 80GB HBM3"
    assert (gpu.faults, gpu.remarks) == ((), ())


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<dram_uncorrectable>0<", "<dram_uncorrectable>2<", "2 uncorrectable ECC errors"),
        ("parity>0<", "parity>1<", "1 uncorrectable ECC errors"),
        ("exceeded>No<", "exceeded>Yes<", "SRAM has had more ECC errors"),
        ("failure>No<", "failure>Yes<", "could not be remapped"),
        ("pending>No<", "pending>Yes<", "waits to be remapped: reset it"),
        ("action>None<", "action>Reset<", "the driver asks for: Reset"),
    ],
)
def test_what_makes_a_gpu_unfit(old, new, said):
    assert SMI.count(old) == 1
    [gpu] = parse_smi(SMI.replace(old, new))
    assert len(gpu.faults) == 1
    assert said in gpu.faults[0]


def test_older_gpus_and_drivers_say_it_otherwise():
    [gpu] = parse_smi(VOLTA)
    assert gpu.faults == (
        "2 uncorrectable ECC errors since the driver was loaded", "memory waits to be remapped: reset it"
    )  # fmt: skip
    assert gpu.remarks == ("it is slowed down because of its heat",)
    with pytest.raises(ValueError, match="did not print XML"):
        parse_smi("Failed to initialize NVML: Driver/library version mismatch")


def test_xids_of_hardware_are_told_from_those_of_programs():
    faults, remarks = parse_xids(KERNEL)
    assert faults == ["Xid 79 of the GPU at 0000:4f:00: it has fallen off the bus"]
    assert remarks == ["Xid 63 of the GPU at 0000:65:00: rows of memory were remapped"]


# --- judging ----------------------------------------------------------------------------------------------------------


def node(**changes: Any) -> Measured:
    facts = {"versions": {"Python": "3.12.1", "torch": "2.13.0"}, "free_bytes": {"": 9 << 30}, "smi": None}
    cpu = {"exact": True, "gflops": 50.0, "memory_kept": True, "memory_bytes": 1 << 28}
    facts |= {"kernel": None, **changes.pop("facts", {})}
    compute = {"cpu": cpu | changes.pop("cpu", {}), **changes.pop("compute", {})}
    storage = {"same": True, "write_s": 0.1, "read_s": 0.1, "bytes": 1 << 22}
    return replace(Measured(facts, compute=compute, storage=storage), **changes)


def linked(rates: Mapping[tuple[str, str], float], nodes: Mapping[str, Measured]) -> dict[str, Measured]:
    ways = rates | {(b, a): rate for (a, b), rate in rates.items()}
    return {
        name: replace(measured, sent={b: {"bytes_per_s": rate} for (a, b), rate in ways.items() if a == name})
        for name, measured in nodes.items()
    }


def test_nodes_that_are_alike_are_fit():
    findings = judge({"a": node(), "b": node(ahead_s=0.3), "c": node(cpu={"gflops": 40.0})})
    assert unfit(findings) == {}
    assert {finding.verdict for finding in findings} == {"good"}


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        ({"facts": {"versions": {"Python": "3.12.1", "torch": "2.12.0"}}}, "versions", "torch 2.12.0 (others: 2.13.0)"),
        ({"facts": {"versions": {"Python": "3.12.1"}}}, "versions", "torch is missing"),
        ({"ahead_s": -40.0}, "clock", "-40.0 s off"),
        ({"facts": {"free_bytes": {"": 1 << 20}}}, "disk", "1 MiB free"),
        ({"facts": {"free_bytes": {"/data/runs": None}}}, "disk", "/data/runs is not there"),
        ({"cpu": {"exact": False}}, "compute", "wrong products"),
        ({"cpu": {"memory_kept": False}}, "compute", "does not keep what is written"),
        ({"cpu": {"gflops": 5.0}}, "compute", "10% of the usual"),
        ({"compute": {"cpu": {"error": "MemoryError"}}}, "compute", "MemoryError"),
        ({"compute": {"gpu": {"error": "CUDA driver error"}}}, "gpu compute", "no GPU computes: CUDA driver error"),
        ({"facts": {"smi": SMI.replace("failure>No<", "failure>Yes<")}}, "gpu health", "GPU 0 (NVIDIA H100"),
        ({"facts": {"kernel": KERNEL}}, "gpu health", "Xid 79"),
        ({"storage": {"error": "PermissionError: denied"}}, "storage", "PermissionError"),
        ({"storage": {"same": False}}, "storage", "something else"),
        ({"error": "no answer"}, "reach", "no answer"),
    ],
)
def test_what_makes_a_node_unfit(changes, check, said):
    findings = judge({"a": node(), "b": node(**changes), "c": node()})
    bad = [finding for finding in findings if finding.verdict == "bad"]
    assert [(finding.node, finding.check) for finding in bad] == [("b", check)]
    assert said in bad[0].text
    assert set(unfit(findings)) == {"b"}


def test_gpus_are_compared_with_those_of_all_nodes():
    def gpus(*speeds: float) -> dict[str, Any]:
        each = {"exact": True, "memory_kept": True, "memory_bytes": 1 << 34}
        return {"gpu": [{"index": index, "tflops": speed, **each} for index, speed in enumerate(speeds)]}

    findings = judge({"a": node(compute=gpus(600.0, 590.0)), "b": node(compute=gpus(610.0, 100.0))})
    assert [finding.text for finding in findings if finding.verdict == "bad"] == [
        "GPU 1: 100.0 TFLOP/s, 17% of the usual; 16 GiB of memory kept"
    ]


def test_the_throttled_node_is_named_although_most_links_are_slow():
    nodes = linked({("a", "b"): 1e9, ("a", "c"): 2e6, ("b", "c"): 2e6}, {name: node() for name in "abc"})
    assert set(unfit(judge(nodes))) == {"c"}
    four = {(x, y): 1e9 if "d" not in (x, y) else 3e6 for x in "abcd" for y in "abcd" if x < y}
    assert set(unfit(judge(linked(four, {name: node() for name in "abcd"})))) == {"d"}


def test_of_two_nodes_a_slow_link_is_odd_and_nobody_is_blamed():
    findings = judge(linked({("a", "b"): 2e6}, {"a": node(), "b": node()}))
    assert unfit(findings) == {}
    assert [f.node for f in findings if f.check == "network" and f.verdict == "odd"] == ["a", "b"]


def test_a_node_that_reaches_nobody():
    nodes = linked({("a", "b"): 1e9}, {"a": node(), "b": node()})
    nodes["c"] = replace(node(), sent={"a": {"error": "No route to host"}, "b": {"error": "No route to host"}})
    nodes = {
        name: replace(m, sent={**(m.sent or {}), "c": {"error": "timed out"}}) if name != "c" else m
        for name, m in nodes.items()
    }
    assert set(unfit(judge(nodes))) == {"c"}


# --- measuring --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40))
def test_every_pair_meets_once_and_nobody_is_in_two_at_a_time(count):
    nodes = [f"n{number}" for number in range(count)]
    met: Counter[frozenset[str]] = Counter()
    for pairs in rounds(nodes):
        busy = [name for pair in pairs for name in pair]
        assert len(busy) == len(set(busy))
        met.update(map(frozenset, pairs))
    assert len(met) == count * (count - 1) // 2
    assert set(met.values()) <= {1}


class Here:
    """Nodes that are all this process. `lies`: (node, probe) -> what it answers instead."""

    def __init__(self, *nodes: str, lies: Mapping[tuple[str, str], Any] | None = None) -> None:
        self.nodes, self.lies = nodes, dict(lies or {})
        self.addresses = dict.fromkeys(nodes, "127.0.0.1")
        self.unreached = {"gone": "it does not answer"}

    def ask(self, node: str, probe: str, **question: Any) -> Any:
        lie = self.lies.get((node, probe))
        if isinstance(lie, Exception):
            raise lie
        answer = PROBES[probe](question)
        return {**answer, **lie} if lie else answer


def test_real_measurements_of_this_machine(tmp_path):
    prober = Here("a", "b", "c", lies={("b", "node_facts"): {"time": 0.0}, ("c", "compute"): NodeError("it crashed")})
    wanted = Wanted(storage=str(tmp_path / "runs"), environ={"MINE": "1"}, folders=("", str(tmp_path / "runs")))
    said: list[str] = []
    measured = examine(prober, wanted, said.append)
    assert list(measured) == ["gone", "a", "b", "c"]
    a = measured["a"]
    assert a.facts["versions"]["torch"].startswith("2.")
    assert a.compute is not None and a.compute["cpu"]["exact"] and a.compute["cpu"]["memory_kept"]
    assert a.compute["cpu"]["memory_bytes"] > 1 << 20
    assert a.storage is not None and a.storage["same"]
    assert a.sent is not None and a.sent["b"]["bytes_per_s"] > 0
    assert list((tmp_path / "runs").iterdir()) == []  # nothing stays
    bad = unfit(judge(measured))
    assert set(bad) == {"gone", "b", "c"}
    assert "s off the others'" in bad["b"][0]


def test_what_fails_on_a_node_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    answer = PROBES["storage"]({"url": str(tmp_path / "file"), "name": "x", "environ": {}})
    assert "Error" in answer["error"]
    monkeypatch.setattr(host_probe, "COMPUTE_S", 0.0)
    assert PROBES["compute"]({"gpus": False})["cpu"] == {"error": "no answer within 0 s"}
    refused = PROBES["send"]({"address": "127.0.0.1", "port": 1})
    assert "refused" in refused["error"]


def test_pairs_that_have_not_had_their_turn_in_time_are_left_out():
    ticks, nodes = iter([0.0, 0.0, *[examining.LONGEST_S + 1.0] * 100]), ["a", "b", "c"]
    sent = examining._send(Here(*nodes), nodes, rounds(nodes), examining.LONGEST_S, lambda: next(ticks))
    assert sum(len(answers) for answers in sent.values()) == 2


def test_a_node_that_was_slow_for_a_moment_is_not_unfit():
    """A disturbed first look at c's links and its arithmetic; and d, which stays slow. How fast this machine is just
    now is no part of it."""

    asked: Counter[tuple[str, str]] = Counter()

    class Disturbed(Here):
        def ask(self, node: str, probe: str, **question: Any) -> Any:
            asked[node, probe] += 1
            first = asked[node, probe] <= (3 if probe == "send" else 1)
            match probe:
                case "sink":
                    return {"port": 1}
                case "send":
                    slow = node == "d" or (node == "c" and first)
                    return {"bytes_per_s": 1.0 if slow else 1e9, "round_trip_s": 1e-4}
                case "compute":
                    speed = 1e-3 if node == "c" and first else 50.0
                    cpu = {"gflops": speed, "exact": True, "memory_kept": True, "memory_bytes": 1 << 28}
                    return {"cpu": cpu}
            return {**super().ask(node, probe, **question), "free_bytes": {"": 1 << 40}, "kernel": None}

    measured = examine(Disturbed("a", "b", "c", "d"), Wanted(gpus=False), print)
    bad = unfit(judge(measured))
    assert set(bad) == {"gone", "d"}
    assert "best link" in bad["d"][0]
    assert measured["c"].compute is not None
    assert measured["c"].compute["cpu"]["gflops"] == 50.0
    assert (asked["c", "compute"], asked["a", "compute"]) == (2, 1)


def test_what_is_looked_at_follows_from_the_recipe():
    wanted = wanted_of(SshCluster(hosts=("a",), env=("AWS_*",)), "s3://b/runs", {"AWS_KEY": "k", "HOME": "/h"})
    assert (wanted.storage, wanted.environ, wanted.folders) == ("s3://b/runs", {"AWS_KEY": "k"}, ("",))
    assert wanted_of(LocalCluster(gpus_per_node=0), None, {}) == Wanted(None, {}, ("",), gpus=False)


def test_this_machine_by_the_command(place, capsys):
    (place / "clusters").mkdir()
    (place / "clusters" / "desk.yaml").write_text("{type: local, gpus_per_node: 0}\n")
    assert cli.main(["doctor", "--cluster", "desk", "--json"]) == 0
    found = [Finding(**each) for each in json.loads(capsys.readouterr().out)]
    assert {finding.node for finding in found} == {"this machine"}
    assert {"versions", "clock", "disk", "compute"} <= {finding.check for finding in found}
    assert cli.main(["doctor"]) == 1
    assert "name a recipe, or a profile" in capsys.readouterr().err
    (place / "clusters" / "bad.yaml").write_text("{type: local, gpu_per_node: 0}\n")
    assert cli.main(["doctor", "--cluster", "bad"]) == 1
    assert "gpus_per_node" in capsys.readouterr().err
