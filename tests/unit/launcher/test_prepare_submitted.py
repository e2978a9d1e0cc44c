"""A preparation on nodes that are elsewhere: what is asked of them, how its driver ends, that nothing stays behind."""

from __future__ import annotations

import io
import json
import signal

import pytest
from rich.console import Console

from ftlaunch.cluster.restarts import BEGUN, LEFT, LEFT_EARLY
from ftlaunch.launcher import prepare_drive, prepare_submit
from ftlaunch.launcher.prepare_drive import Driven
from ftlaunch.launcher.prepare_submit import cores_only
from ftlaunch.recipes.errors import InfrastructureError
from ftlaunch.recipes.schema_cluster import SlurmCluster, SshCluster
from ftlaunch.recipes.schema_kubernetes import KubernetesCluster


def test_gpus_are_left_out_and_their_cores_are_not():
    pods = KubernetesCluster.model_validate({"type": "kubernetes", "image": "i", "nodes": 2, "gpus_per_node": 8})
    asked = cores_only(pods)
    assert (asked.gpus_per_node, asked.cpus_per_node, asked.nodes) == (0, 64, 2)
    given = cores_only(SlurmCluster(type="slurm", gpus_per_node=8, gres="gpu:a100:8,lscratch:100"))
    assert (given.gpus_per_node, given.gres) == (0, "lscratch:100")
    assert cores_only(SlurmCluster(type="slurm", gres="gpu:8")).gres is None
    assert cores_only(SshCluster(type="ssh", hosts=("a",))).gpus_per_node == 0


class FakeJob:
    """A cluster whose job does what it is made with."""

    def __init__(self, *, standing=None, follow=0, stop=None) -> None:
        self._does = {"standing": standing, "follow": follow, "stop": stop}
        self.called: list[str] = []

    def _do(self, name):
        self.called.append(name)
        if isinstance(self._does[name], BaseException):
            raise self._does[name]
        return self._does[name]

    def standing(self):
        return self._do("standing")

    def follow(self, _write):
        return self._do("follow")

    def stop(self, how):
        assert how == "now"
        return self._do("stop")


def follow(job: FakeJob) -> tuple[int | None, str]:
    """The exit code, None where it raises; what is said."""
    said = io.StringIO()
    try:
        code = prepare_submit._follow(job, "j1", Console(file=said, width=200))
    except InfrastructureError:
        code = None
    return code, said.getvalue()


LOST = InfrastructureError("host b does not answer")


@pytest.mark.parametrize(
    ("job", "code"),
    [
        (FakeJob(), 0),
        (FakeJob(follow=1), 1),
        (FakeJob(stop=LOST), 0),  # it is done, whatever its nodes do then
        (FakeJob(follow=1, stop=LOST), 1),
        (FakeJob(follow=KeyboardInterrupt()), 130),
        (FakeJob(standing=KeyboardInterrupt()), 130),
        (FakeJob(standing=LOST), None),
        (FakeJob(follow=LOST), None),
    ],
)
def test_it_never_goes_on_alone(job, code):
    got, said = follow(job)
    assert got == code
    assert job.called[-1] == "stop"
    if code in (None, 130):
        assert "the same command goes on from there" in said


def test_what_could_not_be_ended_is_named():
    _, said = follow(FakeJob(follow=KeyboardInterrupt(), stop=LOST))
    assert "job j1 could not be ended, and may still be there: host b does not answer" in said


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "driver.json"
    path.write_text(json.dumps({"max_restarts": 2}))
    return path


def test_one_that_dies_without_a_new_shard_is_not_begun_again_for_ever(file):
    for _ in range(2):
        Driven(file, "", "it was killed")._spend(2)
    with pytest.raises(InfrastructureError, match=r"it was killed; it is not started again \(cluster.max_restarts\)"):
        Driven(file, "", "it was killed")._spend(2)
    Driven(file, "", "")._spend(2)  # asked to leave, not killed
    Driven(file, "", "")._made()
    Driven(file, "", "it was killed")._spend(2)


def test_how_a_driver_that_leaves_answers(file):
    idle, busy, stopped = (Driven(file, "", "") for _ in range(3))
    for driven, number in ((idle, signal.SIGUSR1), (busy, signal.SIGUSR1), (stopped, signal.SIGTERM)):
        with pytest.raises(KeyboardInterrupt):
            driven._end(number, None)
        driven._end(number, None)  # the second time it is on its way
    assert not file.with_name(BEGUN).exists()
    busy._made()
    assert file.with_name(BEGUN).exists()
    assert [driven.answer(130) for driven in (idle, busy, stopped)] == [LEFT_EARLY, LEFT, 130]
    assert busy.answer(0) == 0  # it was done before it was asked
    assert busy.answer(1) == 1


def test_ray_does_not_keep_sigterm(file, monkeypatch):
    """It ends the process with the signal's number as exit code."""
    monkeypatch.setattr(prepare_drive.Joined, "up", lambda _self, _code: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    driven = Driven(file, "", "")
    try:
        prepare_drive._Joined("", None, driven.listen).up(None)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
