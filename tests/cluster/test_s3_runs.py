"""Runs whose data, model and run directory lie in an object store: moto speaks S3 over HTTP."""

from __future__ import annotations

import json
import re
import time
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import boto3
import pytest
import torch
from forked import ForkedRanks, run_forked
from moto.server import ThreadedMotoServer
from processes import ftlaunch, run
from tiny import recipe_for, text_rows, write_parquet, write_recipe
from training import read_run
from transformers import AutoModelForCausalLM

from ftlaunch.distributed import entry, storage
from ftlaunch.launcher import cli

BUCKET = "s3://acme"
STEPS = 12


class RangeHandler(SimpleHTTPRequestHandler):
    """A web server's answers to requests for parts of files."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        part = data[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def store():
    """A store with an empty bucket, for this process and those it starts."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket="acme")
        yield
    server.stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, store) -> Path:
    """Model and data, here and in the bucket."""
    folder: Path = tmp_path_factory.mktemp("s3-runs")
    recipe_for(folder)
    for path in [*folder.glob("*.*"), *(folder / "model").iterdir()]:
        storage.write_bytes(f"{BUCKET}/{path.relative_to(folder)}", path.read_bytes())
    return folder


def recipe_in(place: str, folder: Path, runs: str, name: str) -> str:
    """The recipe over data and model in `place`, as a file."""
    recipe = recipe_for(folder, name=name, train={"max_steps": STEPS}, model={"path": f"{place}/model"})
    for source in [*recipe["data"]["train"], *recipe["data"]["eval"]]:
        source["path"] = f"{place}/{Path(source['path']).name}"
    recipe["checkpoint"] = {"path": runs, "every_steps": 3}
    return str(write_recipe(folder / f"{name}.yaml", recipe))


@pytest.fixture(scope="module")
def local(folder) -> dict[str, torch.Tensor]:
    """What two ranks make of the same files on a disk."""
    code, output = run_forked(2, [recipe_in(str(folder), folder, str(folder / "runs"), "local")], folder)
    assert code == 0, output
    return weights(read_run(folder / "runs/local").checkpoint)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    return state


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def committed(name: str, step: int) -> bool:
    return storage.exists(f"{BUCKET}/runs/{name}/commits/step-{step:06d}.json")


@pytest.fixture(scope="module")
def bot(folder) -> str:
    """A run in the bucket: everything is there, and all its processes are killed once, after a commit."""
    arguments = [recipe_in(BUCKET, folder, f"{BUCKET}/runs", "bot")]
    first = ForkedRanks(2, arguments, folder)
    assert first.wait_until(partial(committed, "bot", 3)), first.text
    first.kill()
    code, output = run_forked(2, arguments, folder)
    assert code == 0, output
    assert "continuing run bot from step" in output
    return f"{BUCKET}/runs/bot"


def test_killed_and_resumed_in_a_bucket(bot, local, tmp_path, monkeypatch, capsys):
    """`pull` fetches what plain transformers opens, with the weights of an undisturbed run on a disk."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["pull", bot, "bot"]) == 0
    assert f"step {STEPS}:" in capsys.readouterr().out
    assert_equal(weights(tmp_path / "bot"), local)
    assert cli.main(["status", bot]) == 0
    shown = capsys.readouterr().out
    assert "finished" in shown
    assert "lost work" in shown
    assert cli.main(["list", f"{BUCKET}/runs"]) == 0
    assert "bot" in capsys.readouterr().out
    assert cli.main(["generate", bot, "alpha", "--max-new-tokens", "2"]) == 0
    lines = [json.loads(line) for line in storage.read_bytes(f"{bot}/metrics.jsonl").splitlines()]
    assert {line["step"] for line in lines if line["kind"] == "step"} == set(range(1, STEPS + 1))
    assert {line["attempt"] for line in lines} == {1, 2}


def test_a_run_starts_from_another_runs_end(bot, folder, local):
    """`model.path` may be a run, in a bucket or on a disk: its latest checkpoint is meant."""
    for place in (bot, str(folder / "runs/local")):
        name = f"from-{place.rpartition('/')[2]}"
        values = [f"model.path={place}", f"name={name}", "train.max_steps=2", "checkpoint.every_steps=null"]
        assert entry.main([str(folder / "local.yaml"), *values]) == 0
    bucket, disk = (read_run(folder / "runs" / name) for name in ("from-bot", "from-local"))
    assert bucket.losses == disk.losses
    assert_equal(weights(bucket.checkpoint), weights(disk.checkpoint))
    # It goes on from there: a first loss far below that of the model the other run began with.
    assert bucket.losses[0] < 0.95 * read_run(folder / "runs/local").losses[0]


def test_planned_and_checked_from_a_laptop(folder, capsys):
    recipe = recipe_in(BUCKET, folder, f"{BUCKET}/runs", "planned")
    assert cli.main(["plan", recipe, "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert plan["run"] == f"{BUCKET}/runs/planned"
    assert plan["model"]["parameters"] == 57960
    assert [source["found"]["rows"] for source in plan["sources"] if source["name"] == "text"] == [40]
    assert cli.main(["check", recipe]) == 0


def test_data_over_plain_http(folder, local, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(RangeHandler, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        path = recipe_in(place, folder, str(tmp_path / "runs"), "web")
        assert entry.main([path, f"model.path={folder}/model"]) == 0
        server.shutdown()
    assert entry.main([str(folder / "local.yaml"), "name=one-rank"]) == 0
    assert read_run(tmp_path / "runs/web").losses == read_run(folder / "runs/one-rank").losses


class SlowHandler(RangeHandler):
    """Answers after a while, one request at a time: `serve_forever` of a server without threads."""

    def do_GET(self) -> None:
        time.sleep(0.25)
        super().do_GET()


def test_a_run_that_waits_for_its_data_says_so(tmp_path):
    """Many small blocks behind a slow server, and a model that learns faster than they come."""
    recipe = recipe_for(tmp_path, name="slow", train={"max_steps": 20, "global_batch_size": 4, "micro_batch_size": 4})
    write_parquet(tmp_path / "text.parquet", text_rows(400), row_group_size=4)
    recipe["data"] |= {"eval": [], "pack_buffer": 1}
    with HTTPServer(("127.0.0.1", 0), partial(SlowHandler, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"http://127.0.0.1:{server.server_port}"
        recipe["data"]["train"] = [{"path": f"{place}/text.parquet", "format": "text"}]
        code, said = run(ftlaunch(str(write_recipe(tmp_path / "slow.yaml", recipe))), tmp_path)
        server.shutdown()
    assert code == 0, said
    assert sum(step["data_wait_s"] for step in read_run(tmp_path / "runs/slow").steps[1:]) > 1.0
    assert "the data is the bottleneck" in " ".join(said.split())
    assert "the data is the bottleneck" in (tmp_path / "runs/slow/report.html").read_text()
