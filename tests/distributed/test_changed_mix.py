"""Runs that go on with another mix: shares change from that step on, and it is written down."""

from __future__ import annotations

import json

from tiny import recipe_for, text_rows, write_jsonl
from training import train


def mixed(folder, first, steps, **train_changes):
    """Two sources of one-sample sequences, one step a sequence."""
    return recipe_for(
        folder,
        data={
            "packing": False,
            "train": [
                {"name": "a", "path": str(folder / "a.jsonl"), "format": "text", "weight": first},
                {"name": "b", "path": str(folder / "b.jsonl"), "format": "text", "weight": 1 - first},
            ],
            "eval": [],
        },
        train={
            "max_steps": steps,
            "global_batch_size": 1,
            "micro_batch_size": 1,
            "lr_scheduler": "constant",
            **train_changes,
        },
        evaluate={"at_start": False, "at_end": False},
        checkpoint={"every_steps": None},
    )


def write_rows(folder):
    for number, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", text_rows(80, seed=number, words=(1, 9)))


def last_samples(run):
    """Samples per source that were handed out so far."""
    data = [line for line in run.lines if line["kind"] == "data"][-1]
    return {name: counts["samples"] for name, counts in data["sources"].items()}


def said(run):
    lines = (run.directory / "events.jsonl").read_text().splitlines()
    return [event["text"] for event in map(json.loads, lines) if event["event"] == "message"]


def test_new_weights_hold_from_the_step_on_at_which_a_run_goes_on(tmp_path):
    write_rows(tmp_path)
    before = train(mixed(tmp_path, 0.75, 12))
    assert last_samples(before) == {"a": 9, "b": 3}
    assert not any("weights" in text for text in said(before))
    after = train(mixed(tmp_path, 0.25, 32), world_size=2)
    assert "behind step 12 samples are drawn by new weights: a 0.25, b 0.75 (before: a 0.75, b 0.25)" in said(after)
    # Nothing makes up for the first twelve; one sample had been drawn by the old weights and waited.
    assert abs(last_samples(after)["a"] - (9 + 5)) <= 1
    assert sum(last_samples(after).values()) == 32


def test_another_order_begins_at_the_beginning_and_says_so(tmp_path):
    write_rows(tmp_path)
    train(mixed(tmp_path, 0.5, 4))
    again = train(mixed(tmp_path, 0.5, 8, seed=9))
    assert any("train.seed" in text and "from its beginning" in text for text in said(again))
    assert sum(last_samples(again).values()) == 4, "counted anew, with the new order"
