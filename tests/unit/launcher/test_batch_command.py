"""Batches and sweeps: names, what is checked before the first run starts, and what is said at the end."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftlaunch.distributed.again import Flags
from ftlaunch.launcher import cli
from ftlaunch.launcher.batch import command as batch_command
from ftlaunch.launcher.batch import runner as batch_runner
from ftlaunch.launcher.batch.compare import Result, cells, headings, page, ranked, values
from ftlaunch.launcher.batch.members import make_members
from ftlaunch.launcher.batch.runner import command_of, exit_code
from ftlaunch.launcher.batch.slots import make_slots
from ftlaunch.launcher.batch.sweep import combinations, member_name, parse_sweeps, split_values
from ftlaunch.launcher.hardware import Machine
from ftlaunch.recipes.load import load_recipe

RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("1e-5,2e-5", ("1e-5", "2e-5")),
        ("[q_proj, v_proj],all-linear", ("[q_proj, v_proj]", "all-linear")),
        ("'a,b', c", ("'a,b'", "c")),
        ("{type: lora, rank: 8},{type: lora, rank: 16}", ("{type: lora, rank: 8}", "{type: lora, rank: 16}")),
        ("a", ("a",)),
        ("a,", ("a", "")),
    ],
)
def test_values_are_cut_at_commas_that_belong_to_none_of_them(text, parts):
    assert split_values(text) == parts


def test_several_sweeps_multiply():
    problems: list[str] = []
    sweeps = parse_sweeps(["train.learning_rate=1e-5,2e-5", "adapter.rank=8,16,32"], problems)
    assert problems == []
    made = combinations(sweeps)
    assert len(made) == 6
    assert made[1] == (("train.learning_rate", "1e-5"), ("adapter.rank", "16"))
    assert combinations([]) == [()]


def test_every_wrong_sweep_is_told_of():
    problems: list[str] = []
    texts = ["train.learning_rate", "a..b=1", "name=a,b", "train.seed=1,,2", "train.seed=1,1", "x.y=1", "x.y=2"]
    assert [sweep.key for sweep in parse_sweeps(texts, problems)] == ["x.y"]
    assert len(problems) == 6


keys_of_sweeps = st.lists(st.from_regex(r"[a-z_]{1,9}(\.[a-z_]{1,9}){0,2}", fullmatch=True), min_size=1, max_size=3)
value_texts = st.one_of(st.text(min_size=1, max_size=40), st.text("ab-1.", min_size=1, max_size=5))


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9-]{0,70}", fullmatch=True), keys_of_sweeps, st.data())
def test_names_are_names_and_tell_runs_apart(base, keys, data):
    draw = lambda: tuple((key, data.draw(value_texts)) for key in keys)  # noqa: E731
    one, other = draw(), draw()
    first, second = member_name(base, one), member_name(base, other)
    assert RUN_NAME.fullmatch(first)
    assert first == member_name(base, one)
    assert (first == second) == (one == other)


def test_names_say_what_was_swept():
    settings = (("train.learning_rate", "1e-5"), ("adapter.rank", "8"))
    assert member_name("bot", settings) == "bot-learning_rate-1e-5-rank-8"
    strange = member_name("bot", (("data.train.0.path", "s3://a/b c"),))
    assert re.fullmatch(r"bot-path-s3-a-b-c-[0-9a-f]{8}", strange)
    assert strange != member_name("bot", (("data.train.0.path", "s3://a/b-c"),))


def test_everything_is_checked_before_anything_starts(place, capsys, monkeypatch):
    monkeypatch.setattr(batch_command.Runner, "run", lambda *_: pytest.fail("it started"))
    (place / "other.yaml").write_text((place / "bot.yaml").read_text().replace("rows.jsonl", "nowhere.jsonl"))
    (place / "broken.yaml").write_text("modle: {path: base}\n")
    words = ["batch", "bot.yaml", "broken.yaml", "--sweep", "train.learning_rate=1e-5,fast", "--sweep", "x"]
    assert cli.main(words) == 1
    said = capsys.readouterr().err
    for part in ("broken.yaml", "modle", "train.learning_rate", "--sweep x: write key.sub=value"):
        assert part in said
    assert cli.main(["batch", "bot.yaml", "other.yaml"]) == 1
    assert "nowhere.jsonl" in capsys.readouterr().err
    assert cli.main(["batch", "bot.yaml", "bot.yaml"]) == 1
    assert "2 runs of the batch would be" in capsys.readouterr().err
    assert cli.main(["batch", "bot.yaml", "--at-once", "0"]) == 1
    assert cli.main(["batch", "train.seed=1"]) == 1
    assert "name at least one recipe" in capsys.readouterr().err
    assert not (place / "runs").exists()
    assert not (place / "batches").exists()


def test_a_dry_run_lists_the_runs(place, capsys):
    words = ["batch", "bot.yaml", "train.max_steps=2", "--sweep", "train.seed=1,2", "--sweep", "train.weight_decay=0,1"]
    assert cli.main([*words, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "batch bot-sweep: 4 runs, 1 at once" in shown
    assert "bot-seed-2-weight_decay-1  train.seed=2  train.weight_decay=1" in shown
    assert not (place / "runs").exists()


def members(place: Path, sweeps: list[str], *overrides: str):
    return make_members(
        [place / "bot.yaml"], overrides, sweeps, lambda path, changes: load_recipe(path, changes, environ={"KEY": "s3"})
    )


def test_a_runs_command_holds_no_secret(place):
    [member] = members(place, [], "track.wandb.project=${KEY}")
    assert member.loaded.recipe.track.wandb.project == "s3"
    words = command_of(member, Flags(accept_changes=True))
    assert words[-4:] == [str(place / "bot.yaml"), "track.wandb.project=${KEY}", "name=bot", "--accept-changes"]


def test_runs_on_this_machines_gpus_share_them_out(place):
    made = members(place, ["train.seed=1,2,3"], "cluster.gpus_per_node=2")
    problems: list[str] = []
    slots = make_slots(made, 2, Machine(gpus=4), None, problems)
    assert slots == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    slots = make_slots(made, 2, Machine(gpus=4), "4,5,6,7", problems)
    assert slots[1] == {"CUDA_VISIBLE_DEVICES": "6,7"}
    assert problems == []
    make_slots(made, 3, Machine(gpus=4), None, problems)
    assert "runs of 2 GPUs each, and this machine has 4" in problems[0]
    assert make_slots(members(place, []), 2, Machine(gpus=0), None, problems) == [{}, {}]


@pytest.mark.parametrize(
    ("codes", "interrupted", "code"),
    [
        ([0, 0], False, 0), ([0, 1], False, 1), ([1, 2], False, 2), ([0, -9], False, 2), ([0], True, 130),
        ([], False, 0),
    ],
)  # fmt: skip
def test_the_exit_code_says_how_bad_it_is(codes, interrupted, code):
    assert exit_code({str(number): each for number, each in enumerate(codes)}, interrupted=interrupted) == code


FAKE = """
import sys, time, pathlib
name = next(word for word in sys.argv if word.startswith("name=")).removeprefix("name=")
log = pathlib.Path("order")
with log.open("a") as out: out.write(f"+{name}\\n")
gate = pathlib.Path(f"go-{name}")
while "wait" in sys.argv and not gate.exists(): time.sleep(0.01)
if "together" in sys.argv:
    while log.read_text().count("+") < 2: time.sleep(0.01)
    time.sleep(0.5)  # for others that would be started too
with log.open("a") as out: out.write(f"-{name}\\n")
print("said by", name)
sys.exit(3 if name.endswith("2") else 0)
"""


def test_never_more_at_once_than_allowed_and_one_that_fails_stops_no_other(place, monkeypatch, capsys):
    """The runs are stand-ins; real ones are in tests/cluster/test_batch_runs.py."""
    words = [sys.executable, "-c", FAKE, "together"]
    monkeypatch.setattr(batch_runner, "command_of", lambda member, _: [*words, *member.overrides])
    assert cli.main(["batch", "bot.yaml", "--sweep", "train.seed=1,2,3,4,5", "--at-once", "2"]) == 2
    running, most = set(), 0
    for line in (place / "order").read_text().splitlines():
        (running.add if line[0] == "+" else running.discard)(line[1:])
        most = max(most, len(running))
    assert most == 2
    assert (place / "order").read_text().count("+") == 5
    shown = capsys.readouterr().out
    assert "bot-seed-2: exit code 3 after" in shown
    assert "said by bot-seed-2" in shown
    table = json.loads((place / "batches" / "bot-sweep" / "comparison.json").read_text())
    assert {row["name"]: row["exit_code"] for row in table}["bot-seed-2"] == 3
    assert {row["state"] for row in table if row["name"] == "bot-seed-2"} == {"refused"}


def test_ctrl_c_starts_no_more_and_tells_those_that_run(place, monkeypatch, capsys):
    told: list[int] = []

    def watch(self, running):
        if running and not told:
            told.append(running[0].process.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(batch_command._Progress, "watch", watch)
    words = [sys.executable, "-c", FAKE, "wait"]
    monkeypatch.setattr(batch_runner, "command_of", lambda member, _: [*words, *member.overrides])
    assert cli.main(["batch", "bot.yaml", "--sweep", "train.seed=1,2"]) == 130
    assert (place / "order").read_text() == "+bot-seed-1\n"
    assert "the same command goes on from there" in capsys.readouterr().out
    table = json.loads((place / "batches" / "bot-sweep" / "comparison.json").read_text())
    assert {row["state"] for row in table if row["name"] == "bot-seed-2"} == {"not started"}


def result(name: str, **more: object) -> Result:
    return Result(name=name, settings={"train.seed": name}, state="finished", run=f"runs/{name}", exit_code=0, **more)


RESULTS = [
    result("a", loss=2.0, losses={"t/loss": 3.0}, points=[(1.0, 3.0), (2.0, 2.0)]),
    result("b", loss=1.0, losses={"t/loss": 1.5}, tokens=20_000),
    result("c", loss=float("nan"), losses={"t/loss": float("nan")}, message="<b>the loss is nan</b>"),
    result("d"),
]


def test_the_best_run_comes_first_and_what_is_no_number_last():
    assert [each.name for each in ranked(RESULTS)] == ["b", "a", "c", "d"]
    assert [row["loss"] for row in values(RESULTS)] == [1.0, 2.0, None, None]
    assert json.loads(json.dumps(values(RESULTS), allow_nan=False))[0]["losses"] == {"t/loss": 1.5}


def test_the_table_and_the_page():
    names = headings(RESULTS)
    assert names[:5] == ["run", "train.seed", "state", "steps", "t/loss"]
    assert dict(zip(names, cells(RESULTS[1], RESULTS), strict=True))["tokens"] == "20k"
    html = page(RESULTS, "a<b")
    assert "a&lt;b" in html
    assert "&lt;b&gt;the loss is nan&lt;/b&gt;" in html
    assert html.index(">b</td>") < html.index(">a</td>")
    assert html.count("<polyline") >= 1
