"""Starting a recipe whose run is there already: what continues, is extended or refused; at any world size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import Command, rank_alone, run
from tiny import chat_rows, make_model, recipe_for, write_jsonl, write_recipe
from training import read_run, train, train_all

from ftlaunch.distributed import entry
from ftlaunch.distributed.again import Flags
from ftlaunch.distributed.indexing import accept_changed_data
from ftlaunch.distributed.run_directory import RunDirectory
from ftlaunch.distributed.world import World
from ftlaunch.launcher import cli, supervisor
from ftlaunch.launcher.control import Ending
from ftlaunch.recipes.errors import FtlaunchError
from ftlaunch.recipes.load import LoadedRecipe

CONSTANT = {"max_steps": 4, "lr_scheduler": "constant"}


class SameProcess:
    """`supervise` without Ray: the rank runs here, and the launcher's decisions are real."""

    def __call__(self, loaded: LoadedRecipe, wanted: object, view: Any) -> Ending:
        try:
            return Ending(entry.run_rank(entry.Job(loaded, World(), "", Watched(view), ("ftlaunch",))))
        except FtlaunchError as error:
            return Ending("failed", str(error), error.exit_code)


class Watched:
    """Hands a rank's events to the view."""

    def __init__(self, view: Any) -> None:
        self.emit = view.update

    def stop_requested(self) -> bool:
        return False


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """`ftlaunch tiny.yaml WORDS` with its ranks in this process: (exit code, what was said)."""
    monkeypatch.setattr(supervisor, "supervise", SameProcess())
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, train=CONSTANT))

    def run_cli(*words: str) -> tuple[int, str]:
        code = cli.main(["tiny.yaml", *words])
        shown = capsys.readouterr()
        return code, " ".join((shown.out + shown.err).split())

    return run_cli


def tensors(directory: Path) -> list[bytes]:
    checkpoint = read_run(directory).checkpoint
    return [(checkpoint / name).read_bytes() for name in ("model.safetensors", "training/exp_avg_sq.safetensors")]


def stored(directory: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    state: dict[str, Any] = json.loads((read_run(directory).checkpoint / "training/state.json").read_text())
    return state


def test_a_finished_run_answers_with_its_summary_and_more_steps_extend_it(launch, tmp_path):
    assert launch()[0] == 0
    before = sorted(path.name for path in (tmp_path / "runs/tiny").rglob("*"))
    code, said = launch()
    assert code == 0
    assert "run tiny is finished (step 4)" in said
    assert "chats/loss" in said
    assert sorted(path.name for path in (tmp_path / "runs/tiny").rglob("*")) == before

    code, said = launch("train.max_steps=7", "checkpoint.keep_last=1", "checkpoint.every_steps=5")
    assert code == 0
    assert "extending run tiny from step 4" in said
    assert "changed: checkpoint.keep_last: 2 -> 1" in said
    assert "changed: checkpoint.every_steps: 3 -> 5" in said
    assert launch("name=longer", "train.max_steps=7")[0] == 0
    assert tensors(tmp_path / "runs/tiny") == tensors(tmp_path / "runs/longer")
    assert read_run(tmp_path / "runs/tiny").losses == read_run(tmp_path / "runs/longer").losses
    assert len(list((tmp_path / "runs/tiny/commits").iterdir())) == 1

    code, said = launch("train.max_steps=5")
    assert code == 1
    assert "train.max_steps: 7 -> 5" in said


def test_more_epochs_go_on_where_the_first_ended(launch, tmp_path):
    epochs = ["train.max_steps=null", "data.eval=[]"]
    assert launch(*epochs, "train.num_epochs=1")[0] == 0
    first = stored(tmp_path / "runs/tiny")
    code, said = launch(*epochs, "train.num_epochs=2")
    assert code == 0
    assert f"extending run tiny from step {first['extent']['steps']}" in said
    assert launch(*epochs, "train.num_epochs=2", "name=longer")[0] == 0
    extended, longer = stored(tmp_path / "runs/tiny"), stored(tmp_path / "runs/longer")
    rows = [
        {name: sum(stream["counters"][name]["rows"] for stream in state["stream"].values()) for name in ("chat",)}
        for state in (first, extended, longer)
    ]
    assert rows == [{"chat": 60}, {"chat": 120}, {"chat": 120}]
    assert extended["extent"]["tokens"] == longer["extent"]["tokens"]


def test_other_training_numbers_stop_with_a_diff(launch, tmp_path):
    assert launch("train.max_steps=2")[0] == 0
    code, said = launch("train.max_steps=3", "train.learning_rate=1e-3")
    assert code == 1
    assert "train.learning_rate: 0.003 -> 0.001" in said
    assert "--fresh" in said
    assert "--accept-changes" in said

    code, said = launch("train.max_steps=3", "train.learning_rate=1e-3", "--fresh")
    assert code == 0
    assert "new run tiny-2" in said
    assert len(read_run(tmp_path / "runs/tiny-2").steps) == 3

    code, said = launch("train.max_steps=3", "train.learning_rate=1e-3", "--accept-changes")
    assert code == 0
    assert "changed: train.learning_rate: 0.003 -> 0.001" in said
    steps = read_run(tmp_path / "runs/tiny").steps
    assert [step["learning_rate"] for step in steps] == [3e-3, 3e-3, 1e-3]
    assert (tmp_path / "runs/tiny/recipe.a2.yaml").exists()
    # The values that were accepted are the run's from now on.
    code, said = launch("train.max_steps=3", "train.learning_rate=1e-3")
    assert code == 0
    assert "is finished" in said


def test_another_model_or_adapter_is_refused_and_what_does_not_fit_is_named(launch, tmp_path):
    """Also where the change was accepted: ranges of tensors of another shape would be other numbers."""
    make_model(tmp_path / "other", seed=1)
    make_model(tmp_path / "wider", hidden_size=48)
    write_jsonl(tmp_path / "other.jsonl", chat_rows(30, seed=5))
    assert launch("train.max_steps=2")[0] == 0
    assert launch("train.max_steps=2", "name=lora", "adapter={rank: 4}")[0] == 0
    more = ["train.max_steps=3"]
    for words, change in (
        ([f"model.path={tmp_path}/other"], "model.path: "),
        (["adapter={rank: 4}"], "adapter: none -> {"),
        (["data.train=[{path: other.jsonl, format: chat}]"], "data.train: ["),
        (["train.global_batch_size=16"], "train.global_batch_size: 8 -> 16"),
        (["name=lora", "adapter={rank: 8}"], "adapter.rank: 4 -> 8"),
    ):
        code, said = launch(*more, *words)
        assert code == 1
        assert "was begun with other values" in said and change in said, said
        assert "--fresh" in said and "--accept-changes" in said
    for words, reasons in (
        ([f"model.path={tmp_path}/wider"], ["model.embed_tokens.weight is (307, 40) in the checkpoint and (307, 48)"]),
        (["name=lora", "adapter={rank: 2}"], ["lora_A.weight is (4, 40) in the checkpoint and (2, 40) in the recipe"]),
        (
            ["name=lora", "adapter={rank: 4, target_modules: [q_proj, lm_head]}"],
            ["missing from it: base_model.model.lm_head.lora_A.weight", "not in the recipe's model: base_model.model"],
        ),
    ):
        code, said = launch(*more, *words, "--accept-changes")
        assert code == 1
        assert "is a checkpoint of another model or adapter than the recipe's" in said, said
        assert all(reason in said for reason in reasons), said
    code, said = launch(*more)
    assert code == 0 and "from step 2" in said, "what was refused has changed nothing"


def test_another_global_batch_goes_on_where_the_streams_divide_it(launch, tmp_path):
    assert launch("train.max_steps=2")[0] == 0
    code, said = launch("train.max_steps=4", "train.global_batch_size=12", "--accept-changes")
    assert code == 1
    assert "train.global_batch_size 12: the run's data was cut into 8 streams when it began" in said
    assert "Take a multiple of 8, as 16" in said
    code, said = launch("train.max_steps=4", "train.global_batch_size=16", "--accept-changes")
    assert code == 0, said
    assert "changed: train.global_batch_size: 8 -> 16" in said
    tokens = [step["tokens"] for step in read_run(tmp_path / "runs/tiny").steps]  # so far
    assert len(tokens) == 4 and tokens[3] - tokens[1] > 1.5 * tokens[1], "twice as many sequences a step"


def test_accepted_data_is_read_from_its_beginning(launch, tmp_path):
    assert launch("train.max_steps=2")[0] == 0
    write_jsonl(tmp_path / "other.jsonl", chat_rows(30, seed=5))
    data = "data.train=[{path: other.jsonl, format: chat}]"
    assert launch("train.max_steps=4", data)[0] == 1
    code, said = launch("train.max_steps=4", data, "--accept-changes")
    assert code == 0
    assert "it is read from its beginning" in said
    assert stored(tmp_path / "runs/tiny")["extent"]["steps"] == 4


def test_a_run_that_is_alive_is_refused(launch, tmp_path):
    RunDirectory(str(tmp_path / "runs/tiny")).claim_attempt(world_size=1, command=())
    code, said = launch()
    assert code == 1
    assert "run tiny is running: attempt 1 on" in said
    assert entry.main([str(tmp_path / "tiny.yaml")]) == 1


def test_a_first_attempt_that_failed_takes_a_corrected_recipe(launch, tmp_path):
    code, said = launch("train.learning_rate=1e30", "train.max_grad_norm=null", "checkpoint.every_steps=null")
    assert code == 1
    assert "gradient norm" in said
    code, said = launch("train.seed=3")
    assert code == 0, said
    assert "from its beginning" in said
    steps = read_run(tmp_path / "runs/tiny").steps
    assert launch("train.seed=3", "name=clean")[0] == 0
    assert [step["loss"] for step in steps][-4:] == read_run(tmp_path / "runs/clean").losses
    assert tensors(tmp_path / "runs/tiny") == tensors(tmp_path / "runs/clean")


def test_two_starts_at_once_do_not_both_train(tmp_path):
    recipe = recipe_for(tmp_path, train={"max_steps": 5000, "lr_scheduler": "constant"})
    path = str(write_recipe(tmp_path / "tiny.yaml", recipe))
    rank = rank_alone(path)
    first = Command(rank, tmp_path)
    assert first.wait_until((tmp_path / "runs/tiny/metrics.jsonl").exists)
    code, output = run(rank, tmp_path)
    first.kill()
    assert code == 1
    assert "run tiny is running: attempt 1 on" in output
    assert len(list((tmp_path / "runs/tiny/attempts").glob("a?.json"))) == 1


def test_every_resume_may_have_another_world_size_and_strategy(tmp_path):
    """3 steps on 1 rank, 3 on 3, 2 on 2, against 8 on 1."""
    recipe = recipe_for(tmp_path, train={**CONSTANT, "global_batch_size": 12}, evaluate={"every_steps": 4})
    [whole] = train_all([{**recipe, "name": "whole", "train": {**recipe["train"], "max_steps": 8}}])
    for steps, ranks, strategy in ((3, 1, "fsdp"), (6, 3, "fsdp"), (8, 2, "ddp")):
        now = {**recipe, "name": "moved", "strategy": {"type": strategy}}
        moved = train({**now, "train": {**recipe["train"], "max_steps": steps}}, ranks)
    assert [line["step"] for line in moved.steps] == list(range(1, 9))
    assert moved.losses == pytest.approx(whole.losses, rel=1e-5)
    assert moved.grad_norms == pytest.approx(whole.grad_norms, rel=1e-4)
    facts = [json.loads((run.directory / "facts.json").read_text())["streams"] for run in (moved, whole)]
    assert facts[0] == facts[1]
    assert stored(moved.directory)["stream"] == stored(whole.directory)["stream"]


def test_every_row_once_per_epoch_when_nothing_divides(tmp_path):
    """Fewer streams than ranks, no packing, micro-batches that do not divide a rank's share."""
    recipe = recipe_for(
        tmp_path,
        train={"max_steps": None, "num_epochs": 2, "global_batch_size": 10, "micro_batch_size": 3},
        checkpoint={"every_steps": None},
    )
    sources = [{"path": source["path"], "format": source["format"]} for source in recipe["data"]["train"]]
    recipe["data"] |= {"packing": False, "streams": 2, "eval": [], "train": sources}
    alone, three = (train({**recipe, "name": f"on-{ranks}"}, ranks) for ranks in (1, 3))
    for trained in (alone, three):
        [counts] = [line["sources"] for line in trained.lines if line["kind"] == "data"]
        assert {name: source["rows"] for name, source in counts.items()} == {"chat": 120, "text": 80}
        assert set(stored(trained.directory)["stream"]) == {"0", "1"}
    assert three.losses == pytest.approx(alone.losses, rel=1e-5)
    assert [step["supervised_tokens"] for step in three.steps] == [step["supervised_tokens"] for step in alone.steps]


def test_flags_are_the_launchers(tmp_path):
    """A rank under torchrun asks for nothing, and so refuses what needs a flag."""
    path = str(write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, train={"max_steps": 2})))
    assert Flags() == Flags(fresh=False, accept_changes=False)
    assert entry.main([path]) == 0
    assert entry.main([path, "train.seed=5"]) == 1
    assert entry.main([path]) == 0
    assert len(list((tmp_path / "runs/tiny/attempts").glob("a?.json"))) == 1


def test_changed_data_is_refused_by_name_and_accepted_by_a_flag(launch, tmp_path):
    assert launch()[0] == 0
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(70))
    code, said = launch("train.max_steps=6")
    assert code == 1
    assert "chat.jsonl: grew since the run began" in said
    assert "--accept-changed-data" in said
    code, said = launch("train.max_steps=6", "--accept-changed-data")
    assert code == 0, said
    assert "data.train is read as it is now" in said
    assert "files of data.train have changed: epoch 1 begins again on them" in said
    code, said = launch("train.max_steps=7")
    assert code == 0
    assert "begins again" not in said
    assert [step["step"] for step in read_run(tmp_path / "runs/tiny").steps] == list(range(1, 8))


def test_a_rank_under_torchrun_says_that_files_have_changed(tmp_path, capfd):
    """It looks at them itself; under a launcher, that has done so before."""
    path = str(write_recipe(tmp_path / "tiny.yaml", recipe_for(tmp_path, train={**CONSTANT, "max_steps": 2})))
    assert entry.main([path]) == 0
    write_jsonl(tmp_path / "chat.jsonl", chat_rows(70))
    assert entry.main([path, "train.max_steps=4"]) == 1
    capfd.readouterr()
    accept_changed_data(RunDirectory(str(tmp_path / "runs/tiny")))
    assert entry.main([path, "train.max_steps=4"]) == 0
    said = " ".join("".join(capfd.readouterr()).split())
    assert "data.train is read as it is now:" in said
    assert "chat.jsonl: grew since the run began" in said


def test_a_row_format_that_was_found_is_said_and_one_that_sft_does_not_read_is_refused(launch, tmp_path):
    source = f"data.train=[{{path: '{tmp_path}/chat.jsonl'}}]"
    code, said = launch(source, "data.eval=[]")
    assert code == 0
    assert "source chat: its rows are read as chat, which its columns fit" in said
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    code, said = launch(f"data.train=[{{path: '{tmp_path}/pairs.jsonl'}}]", "data.eval=[]", "--fresh")
    assert code == 1
    assert "source pairs: its rows are in format preference, and method sft reads chat, sharegpt" in said
