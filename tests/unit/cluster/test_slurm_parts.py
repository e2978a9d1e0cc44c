"""The parts of the `slurm` cluster that need no Slurm: the script, Slurm's words, what nodes say, who is let in."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ftlaunch.cluster import slurm, slurm_files
from ftlaunch.cluster.base import Driver, Need
from ftlaunch.cluster.restarts import BEGUN, EARLY, ELSEWHERE, LEFT, LEFT_EARLY
from ftlaunch.cluster.slurm import Slurm, overruling
from ftlaunch.cluster.slurm_checks import addresses, demand_of, lacking, problems
from ftlaunch.cluster.slurm_keep import LOST, failures, outcome, refusal, why_again
from ftlaunch.cluster.slurm_queue import Commands, Standing, parse_partitions, parse_standing, partition_problems
from ftlaunch.cluster.slurm_script import Script, directive, output_pattern
from ftlaunch.cluster.slurm_shell import JOB_SH, KILLED
from ftlaunch.recipes.errors import InfrastructureError, Interrupted, UserError
from ftlaunch.recipes.schema_cluster import SlurmCluster

HOSTILE = """it's "so"; $(touch pwned) `id` & \\ # x"""


def config(**changes: Any) -> SlurmCluster:
    return SlurmCluster.model_validate({"type": "slurm", **changes})


def script(**changes: Any) -> str:
    return Script(config(**changes), "bot", "/w/.ftlaunch-job-1", "/py/bin/python", shared=("/w",)).text()


# --- the script -------------------------------------------------------------------------------------------------------


def test_every_option_has_its_line():
    lines = script(
        nodes=3, gpus_per_node=8, partition="gpu,long", account="a", qos="q", constraint="a100&ib", reservation="r",
        time="1-12:00", cpus_per_node=64, memory="0", exclusive=True, mail_user="a@b.c", mail_types=["END", "FAIL"],
        options=["--nice=100", "--spread-job"], leave_before_s=120,
    ).splitlines()  # fmt: skip
    given = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    assert given == {
        "--job-name=bot", "--nodes=3", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu,long",
        "--account=a",
        "--qos=q", "--constraint='a100&ib'", "--reservation=r", "--time=1-12:00", "--cpus-per-task=64", "--mem=0",
        "--exclusive", "--mail-user=a@b.c", "--mail-type=END,FAIL", "--nice=100", "--spread-job", "--requeue",
        "--signal=B:USR1@120", "--output=/w/.ftlaunch-job-1/driver.log", "--open-mode=append", "--export=NIL",
    }  # fmt: skip
    assert lines[0] == "#!/bin/bash -l"
    [step] = [line for line in lines if line.startswith("STEP=")]
    assert {"--nodes=$NODES", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(
        shlex.split(step.removeprefix("STEP=(")[:-1])
    )


def test_gres_stands_in_place_of_a_count_and_requeue_can_be_off():
    said = script(gpus_per_node=8, gres="gpu:a100:8", requeue=False)
    assert "--gpus-per-node" not in said
    assert "#SBATCH --gres=gpu:a100:8" in said
    assert "#SBATCH --no-requeue" in said
    assert "REQUEUE=no" in said


def test_containers():
    pyxis = script(container={"runtime": "pyxis", "image": "nvcr.io#nvidia/x:1", "mounts": ["/data:/d", "/w"]})
    assert "'--container-image=nvcr.io#nvidia/x:1'" in pyxis
    assert "--container-mounts=/w:/w,/data:/d" in pyxis
    assert "INSIDE=()" in pyxis
    apptainer = script(container={"runtime": "apptainer", "image": "/i/a b.sif"}, gpus_per_node=8)
    assert "INSIDE=(apptainer exec --nv --bind /w '/i/a b.sif')" in apptainer
    assert "--nv" not in script(container={"runtime": "apptainer", "image": "/i.sif"}, gpus_per_node=0)


def test_a_hostile_recipe_is_text_to_bash(tmp_path):
    """The body is run, with everything that would leave the machine replaced by a print."""
    folder = tmp_path / HOSTILE
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/job.sh").write_text(
        'unfit() { echo "unfit $1"; exit 1; }\nmodule() { printf "%s\\n" "module: $2"; }\n'
        'run_job() { printf "%s\\n" "${STEP[@]}" "${INSIDE[@]}" "$PYTHON" "$JOB"; }\n'
    )
    cluster = config(
        modules=[HOSTILE], setup=[f"export X={shlex.quote(HOSTILE)}"], python=f"/py/{HOSTILE}", partition=HOSTILE,
        container={"runtime": "apptainer", "image": HOSTILE, "mounts": [HOSTILE]}, options=[f"--comment={HOSTILE}"],
    )  # fmt: skip
    text = Script(cluster, "bot", str(folder), cluster.python, HOSTILE, (HOSTILE,)).text()
    environ = {**os.environ, "SLURM_JOB_NUM_NODES": "1"}
    done = subprocess.run(["bash", "-c", text], cwd=tmp_path, env=environ, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[0] == f"module: {HOSTILE}"
    assert said[-2:] == [f"/py/{HOSTILE}", str(folder)]
    assert said.count(HOSTILE) == 2  # the mount, once, and the image
    assert not list(tmp_path.rglob("pwned"))
    assert all(line.count("\n") == 0 and line.startswith("#SBATCH --") for line in text.splitlines() if "#SB" in line)


def test_a_setup_line_that_fails_ends_the_job(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/job.sh").write_text('unfit() { echo "unfit: $1"; exit 3; }\nrun_job() { echo "A=$A"; }\n')
    for lines, code, says in ((["A=1", "export A"], 0, "A=1"), (["false", "A=2"], 3, "unfit: cluster.setup: false")):
        text = Script(config(setup=lines), "bot", str(tmp_path), "python3").text()
        environ = {**os.environ, "SLURM_JOB_NUM_NODES": "1"}
        done = subprocess.run(["bash", "-c", text], env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip()) == (code, says)


def test_paths_are_meant_literally():
    assert output_pattern("/w/100%j/x") == "/w/100%%j/x"
    assert directive("comment", "a\\b") == "--comment='a\\\\b'"
    assert slurm_files.folder_problems(config(), ["/a b'c"]) == []
    assert "backslashes" in slurm_files.folder_problems(config(), ["/a\\b"])[0]
    container = {"runtime": "pyxis", "image": "x"}
    assert "cannot have , or :" in slurm_files.folder_problems(config(container=container), ["/a,b"])[0]


def test_variables_of_the_shell_do_not_overrule_the_recipe():
    names = overruling({"partition", "time", "cpus-per-task"})
    assert {"SBATCH_PARTITION", "SBATCH_TIMELIMIT", "SBATCH_CPUS_PER_TASK", "SBATCH_EXPORT", "SBATCH_SIGNAL"} <= set(
        names
    )
    assert "SBATCH_ACCOUNT" not in names


def test_what_would_be_submitted_is_shown(tmp_path):
    need = Need(folder=str(tmp_path), name="bot", shared="/w/runs")
    shown = Slurm(config(partition="gpu"), need).render()
    assert "#SBATCH --partition=gpu" in shown
    assert "JOB=/w/runs/.ftlaunch-job-JOB" in shown


# --- the job's shell --------------------------------------------------------------------------------------------------

FAKES = r"""
srun() {{ while [[ $1 != bash ]]; do shift; done; fake_$7; }}
fake_look() {{ return {look}; }}
fake_keep() {{ {keep}; }}
scontrol() {{ echo "scontrol $*"; {scontrol}; }}
squeue() {{ echo "{excluded}"; }}
sinfo() {{ printf '%s\n' {nodes}; }}
"""


def run_shell(folder: Path, keep: str, *, look: int = 0, requeue: str = "yes", **fakes: str) -> Any:
    """`job.sh` with steps and Slurm's commands that are functions. `exec` of a function is not possible, so it is left
    out."""
    (folder / "token").touch()
    text = JOB_SH.replace('exec "${STEP[@]}"', '"${STEP[@]}"')
    usual = {"scontrol": "return 0", "excluded": "", "nodes": ""}
    made = FAKES.format(look=look, keep=keep, **{**usual, **fakes})
    head = (
        f"JOB={shlex.quote(str(folder))}; REQUEUE={requeue}; STEP=(srun); INSIDE=(); PYTHON=python; NODES=2\n"
        "SLURM_JOB_ID=7; SLURM_JOB_PARTITION=gpu\n"
    )
    done = subprocess.run(["bash", "-c", f"{head}{text}{made}run_job"], capture_output=True, text=True, check=False)
    exit_file = folder / "exit"
    return done.returncode, exit_file.read_text() if exit_file.exists() else None, done.stdout + done.stderr


def test_a_run_that_ended_leaves_its_code_and_no_secrets(tmp_path):
    for code in (0, 1, 2, 130):
        assert run_shell(tmp_path, f'echo {code} > "$START/code"')[:2] == (code, str(code))
        assert not (tmp_path / "token").exists()


def test_a_run_that_wants_to_go_on_is_requeued_and_keeps_its_files(tmp_path):
    code, left, said = run_shell(tmp_path, f'echo {LEFT} > "$START/code"')
    assert (code, left) == (0, None)
    assert "scontrol requeue 7" in said
    assert (tmp_path / "token").exists()


def test_a_run_that_died_without_a_word_is_requeued(tmp_path):
    code, left, said = run_shell(tmp_path, "return 1")
    assert (code, left) == (0, None)
    assert "scontrol requeue 7" in said


@pytest.mark.parametrize("asked", ["stop", "now"])
def test_a_run_that_was_to_end_is_not_requeued(tmp_path, asked):
    code, left, said = run_shell(tmp_path, f'ask {asked}; ask leave; echo {LEFT} > "$START/code"')
    assert (code, left) == (130, "130")
    assert "requeue" not in said


def test_where_nothing_can_be_requeued(tmp_path):
    went_on = f'echo {LEFT} > "$START/code"'
    assert run_shell(tmp_path, went_on, requeue="no")[:2] == (130, "130")
    assert run_shell(tmp_path, went_on, scontrol="return 1")[:2] == (130, "130")
    (tmp_path / "start-0/code").unlink()
    assert run_shell(tmp_path, "return 1", requeue="no")[:2] == (2, "2")


def test_a_requeue_that_ends_the_job_before_it_answers_is_one(tmp_path):
    killed = "kill -TERM $$; sleep 0.2; return 143"  # as if the command had been ended too
    code, left, said = run_shell(tmp_path, f'echo {LEFT} > "$START/code"', scontrol=killed)
    assert (code, left) == (0, None)
    assert "the job goes back into the queue" in said
    assert (tmp_path / "token").exists()


HOSTNAMES = 'if [[ "$1 $2" == "show hostnames" ]]; then tr , "\\n" <<< "$3"; fi'
UP = "'n1 mix' 'n2 mix' 'n3 idle~' 'n4 down*' 'n5 drain' 'n7 idle'"


def test_unfit_nodes_are_excluded_where_there_are_others(tmp_path):
    unfit = f'echo {ELSEWHERE} > "$START/code"; printf n2 > "$START/unfit"'
    code, left, said = run_shell(tmp_path, unfit, scontrol=HOSTNAMES, nodes=UP, excluded="n7")
    assert (code, left) == (0, None)
    assert said.index("scontrol requeue 7") < said.index("scontrol update JobId=7 ExcNodeList=n7,n2\n")
    assert "it is not to have n2 again" in said
    code, left, said = run_shell(tmp_path, unfit, scontrol=HOSTNAMES, nodes="'n1 idle' 'n2 idle' 'n4 down*'")
    assert (code, left) == (2, "2")
    assert "partition gpu has too few nodes besides n2" in said
    assert "requeue" not in said


def test_a_job_that_slurm_ends_is_left_to_slurm(tmp_path):
    code, left, said = run_shell(tmp_path, f'kill -TERM $$; sleep 0.2; echo {LEFT} > "$START/code"')
    assert (code, left) == (LEFT, None)
    assert "requeue" not in said
    assert (tmp_path / "start-0/asked").read_text() == "leave"


def test_nodes_that_cannot_be_looked_at_end_the_job(tmp_path):
    assert run_shell(tmp_path, "true", look=9)[:2] == (1, "1")
    assert run_shell(tmp_path, "true", look=KILLED)[:2] == (2, "2")


def test_why_a_job_begins_again(tmp_path):
    assert why_again(tmp_path / "start--1") is None
    for files, why in (
        ((), LOST),
        (("code",), ""),
        (("code", "lost"), LOST),
        (("asked",), ""),
        (("asked", "lost"), ""),
    ):
        before = tmp_path / "-".join(("start", *files))
        before.mkdir()
        for name in files:
            (before / name).write_text(str(LEFT))
        assert why_again(before) == why
    (before / "code").write_text(str(LEFT_EARLY))
    assert why_again(before) == f"{EARLY} (is cluster.time too short?)"
    (before / "asked").unlink()
    assert why_again(before) == LOST


def test_starts_that_end_before_the_run_begins_are_counted_by_the_job(tmp_path):
    """Whatever comes later is on the run's own budget, which a newer checkpoint makes whole again."""

    def start(number: int, code: int | None) -> Path:
        folder = tmp_path / f"start-{number}"
        folder.mkdir()
        if code is not None:
            (folder / "code").write_text(str(code))
        return folder

    assert failures(start(0, LEFT)) == []
    start(1, None)
    start(2, LEFT)
    start(3, LEFT_EARLY)
    early = f"{EARLY} (is cluster.time too short?)"
    assert failures(start(4, None)) == [early]
    assert failures(last := start(5, None)) == [LOST, early]
    spec = {**SPEC, "cluster": config(max_restarts=1).model_dump(mode="json")}
    assert refusal(spec, [node(0)], last) == (2, (
        f"2 starts in a row of this job ended before the run could go on, the last because {LOST}; it is not begun "
        "again (cluster.max_restarts)"
    ))  # fmt: skip
    assert refusal({**spec, "cluster": config(max_restarts=2).model_dump(mode="json")}, [node(0)], last) == (0, "")
    (tmp_path / "start-4" / BEGUN).touch()
    assert failures(last) == []
    assert refusal({**spec, "cluster": config(max_restarts=0).model_dump(mode="json")}, [node(0)], last) == (0, "")
    assert refusal(spec, [node(0, proof="q")], last)[0] == 1
    assert failures(start(6, LEFT)) == [LOST]  # of start 5


def test_what_a_run_comes_to():
    assert [outcome(code, "") for code in (0, 1, 2, 130, 137, 143)] == [0, 1, 2, 130, 2, 2]
    assert outcome(ELSEWHERE, "") == ELSEWHERE
    early = LEFT_EARLY
    assert [outcome(code, "leave") for code in (0, 1, 2, LEFT, early, 130, 137)] == [
        0,
        1,
        early,
        LEFT,
        early,
        early,
        early,
    ]
    assert [outcome(code, "stop") for code in (0, 1, 2, 130, 137)] == [0, 1, 130, 130, 130]


# --- Slurm's words ----------------------------------------------------------------------------------------------------


def test_how_a_job_stands():
    waiting = parse_standing("PENDING|2026-03-02T18:40:00||gpu|Resources\n")
    assert waiting.waits
    assert not waiting.is_over
    assert str(waiting) == (
        "waits in the queue of partition gpu: Resources (nodes are busy); expected to start 2026-03-02 18:40:00"
    )
    unknown = parse_standing("PENDING|N/A||gpu|(Nodes required for job are DOWN, DRAINED|or reserved)")
    assert "Slurm has no expected start yet" in str(unknown)
    assert "a limit of the account" in parse_standing("PENDING|N/A||gpu|AssocGrpGRES").why
    assert str(parse_standing("RUNNING|2026-03-02T18:40:00|n[1-3]|gpu|None")) == "runs on n[1-3]"
    assert parse_standing("COMPLETING|x|n1|gpu|None").runs
    for state in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY"):
        assert Standing(state).is_over


def test_partitions():
    known = parse_partitions("gpu*|2\ngpu*|1\nlong|8\n")
    assert [(one.name, one.nodes, one.is_default) for one in known.values()] == [("gpu", 3, True), ("long", 8, False)]
    assert partition_problems(None, 3, known) == []
    assert partition_problems("gpu,long", 8, known) == []
    assert "cluster.nodes: 4 nodes are asked for, partition gpu has 3" in partition_problems(None, 4, known)[0]
    assert "Slurm knows no partition lnog; did you mean long?" in partition_problems("lnog", 1, known)[0]


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_commands_that_fail(tmp_path):
    commands = Commands({"PATH": str(tmp_path)})
    with pytest.raises(UserError, match="sinfo is not on this machine: run ftlaunch on a login node"):
        commands.partitions()
    command(tmp_path, "sinfo", "echo 'slurm_load_partitions: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(InfrastructureError, match="Unable to contact slurm controller"):
        commands.partitions()
    command(tmp_path, "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(UserError, match="Slurm does not take the job: invalid partition specified: x"):
        commands.submit(tmp_path / "s", [])
    command(tmp_path, "sbatch", 'echo "sbatch: lua: hello" >&2; echo "$SBATCH_PARTITION$SBATCH_QOS;cluster"')
    commands = Commands({"PATH": str(tmp_path), "SBATCH_PARTITION": "5", "SBATCH_QOS": "7"})
    assert commands.submit(tmp_path / "s", ["SBATCH_QOS"]) == ("5", "sbatch: lua: hello")
    command(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert commands.look("7") is None


ANSWER = """
first=$(ls answer-* | head -1)
text=$(cat "$first")
[ "$(ls answer-* | wc -l)" -gt 1 ] && rm "$first"
case "$text" in Unable*) echo "$text" >&2; exit 1 ;; esac
echo "$text"
"""


class Site:
    """Commands that answer from a list, one answer a call, the last one for ever."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *answers: str) -> None:
        self.folder = folder
        for number, answer in enumerate(answers):
            (folder / f"answer-{number}").write_text(answer)
        command(folder, "squeue", f"cd {folder}\n{ANSWER}")
        command(folder, "scancel", f'echo "$*" >> {folder}/cancelled; echo "CANCELLED|x||gpu|None" > {folder}/answer-9')
        command(folder, "sbatch", "echo 7")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        for name in ("READ_S", "LOOK_S", "FIRST_LOOK_S", "LATE_S"):
            monkeypatch.setattr(slurm, name, 0.01)

    def find(self, **changes: Any) -> Slurm:
        """The cluster of job 7."""
        (self.folder / "job").mkdir()
        section = config(**changes).model_dump(mode="json")
        return Slurm.find({"job": "7", "cluster": section, "folder": str(self.folder / "job"), "submitted_at": 0.0})


WAITING, RUNS = "PENDING|N/A||gpu|Resources", "RUNNING|x|n[1-2]|gpu|None"


def test_a_job_is_followed_through_restarts_of_the_controller(tmp_path, monkeypatch):
    lines = [WAITING, "PENDING|2026-01-01T00:00:00||gpu|Resources", "Unable to contact slurm controller", RUNS, RUNS]
    cluster = Site(tmp_path, monkeypatch, *lines).find()
    said: list[bytes] = []

    def write(text: bytes) -> None:
        said.append(text)
        if b"runs" in text:
            (tmp_path / "job/driver.log").write_text("hello\n")
            (tmp_path / "job/exit").write_text("3")

    assert cluster.follow(write) == 3
    text = b"".join(said).decode().splitlines()
    assert [line.partition(":")[0] for line in text] == [
        "job 7 waits in the queue of partition gpu", "job 7 runs on n[1-2]", "hello",
    ]  # fmt: skip


def test_jobs_that_slurm_ended(tmp_path, monkeypatch):
    cluster = Site(tmp_path, monkeypatch, "NODE_FAIL|x||gpu|None").find()
    with pytest.raises(InfrastructureError, match="job 7 is over: NODE_FAIL"):
        cluster.follow(lambda _: None)
    (tmp_path / "answer-0").write_text("CANCELLED|x||gpu|None")
    with pytest.raises(Interrupted, match="job 7 was cancelled"):
        cluster.follow(lambda _: None)
    assert cluster.standing() is None


def test_a_submission_that_is_broken_off_ends_the_job(tmp_path, monkeypatch):
    Site(tmp_path, monkeypatch, "PENDING|N/A||gpu|None")
    environ = {"PATH": os.environ["PATH"]}
    cluster = Slurm(config(), Need(folder=str(tmp_path), name="bot", environ=environ))

    def interrupted(_cluster: Slurm) -> None:
        raise KeyboardInterrupt

    (tmp_path / "code/ftlaunch").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Slurm, "_await_reason", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cluster.up(Driver("m:f", lambda _: {}), lambda: tmp_path / "code/ftlaunch")
    cluster.down()
    assert (tmp_path / "cancelled").read_text().split() == ["7"]
    assert not list(tmp_path.glob(".ftlaunch-job-*"))


# --- what nodes say ---------------------------------------------------------------------------------------------------


def node(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "number": number, "name": f"n{number}", "system": "Linux", "python": "3.11.7", "executable": "/py", "gpus": 0,
        "packages": {"ray": "2.60.0", "torch": "2.13.0"}, "free_bytes": 1 << 40, "scratch": "/tmp/ft-1", "boot": "same",
        "cores": 4, "proof": "p", "launcher": "10.0.0.1", "address": f"10.0.0.{number + 1}", "missing": [], "port": 7,
        **changes,
    }  # fmt: skip


SPEC = {"proof": "p", "folder": "/w/j", "paths": {"model.path": "/m"}, "wanted": {"ray": "ray>=2.60", "torch": "torch"}}


def test_nodes_are_judged_together():
    assert problems(config(), SPEC, [node(0), node(1)]) == []
    bad = node(1, proof="q", missing=["/m"], packages={"ray": "2.59.0", "torch": "2.13.0"})
    said = "\n".join(problems(config(gpus_per_node=2), SPEC, [node(0, gpus=2), bad]))
    assert "node n1: cluster.gpus_per_node is 2, it has 0" in said
    assert "nodes differ: ray is 2.60.0 on n0, 2.59.0 on n1" in said
    assert "node n1: /w/j is not the folder that was written where the job was submitted" in said
    assert "node n1: model.path: /m is not there" in said
    assert "host n" not in said


def test_packages_that_are_missing_are_said_before_any_is_needed():
    assert lacking([node(0)], SPEC["wanted"]) == []
    gone = lacking([node(0), node(1, packages={"ray": None, "torch": "2.13.0"})], SPEC["wanted"])
    assert gone == ["node n1: ftlaunch needs ray>=2.60, which /py does not have; there: /py -m pip install 'ray>=2.60'"]


def test_where_nodes_reach_each_other():
    assert addresses([node(0), node(1)]) == {"n0": "10.0.0.1", "n1": "10.0.0.2"}
    assert addresses([node(0, address="127.0.0.1"), node(1)]) == {"n0": "10.0.0.1", "n1": "10.0.0.2"}
    assert addresses([node(0, address="127.0.0.1")]) == {"n0": "127.0.0.1"}


def test_ranks_and_cores():
    two = [node(0, gpus=4, cores=9), node(1, gpus=4, cores=64)]
    found = demand_of(config(nodes=2), two)
    assert (found.nodes, found.ranks, found.uses_gpus, found.cpus_per_rank) == (2, 8, True, 2)
    found = demand_of(config(nodes=2, gpus_per_node=0, processes_per_node=3), two)
    assert (found.ranks, found.uses_gpus, found.cpus_per_rank) == (6, False, 3)


# --- the job's folder -------------------------------------------------------------------------------------------------


def test_files_of_a_job_are_for_its_user_only(tmp_path):
    need = Need(folder="/w", name="bot", shared=str(tmp_path), environ={"HF_TOKEN": "hf-s3cret", "OTHER": "x"})
    cluster = config(env=["HF_TOKEN"])
    told = slurm_files.spec(cluster, need, tmp_path / "j", "m:f")
    files = slurm_files.contents(told, {"secret": 1}, cluster, need, {"ftlaunch/a.py": b"x"}, "#!/bin/bash\n")
    slurm_files.write(tmp_path / "j", files)
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "j").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o600}
    assert json.loads(files["env.json"]) == {"HF_TOKEN": "hf-s3cret"}
    assert [name for name, content in files.items() if b"hf-s3cret" in content] == ["env.json"]
    assert [name for name, content in files.items() if files["token"] in content] == ["token"]
    slurm_files.remove_secrets(tmp_path / "j")
    assert not {"token", "env.json", "driver.json", "package"} & {path.name for path in (tmp_path / "j").iterdir()}


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        slurm_files.write(tmp_path / "file" / "j", {})
