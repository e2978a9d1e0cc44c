"""Each rule across sections: a recipe that breaks it, and one beside it that does not."""

from __future__ import annotations

from typing import Any

import pytest

from ftlaunch.recipes.checks import CHECKS, advice, run_checks
from ftlaunch.recipes.naming import eval_names, source_name, source_names
from ftlaunch.recipes.schema import Data, EvalSplit, Recipe, Source, TrainSource

A, B = {"path": "a.jsonl"}, {"path": "b.jsonl"}
REMOTE = {"path": "s3://acme/c.jsonl"}
PODS = {"type": "kubernetes", "image": "ftlaunch:0.1", "gpus_per_node": 8}
AMI = "ami-0123456789abcdef0"
HELD_OUT = [{"path": "h.jsonl", "name": "held"}]


def recipe(**sections: Any) -> Recipe:
    base = {"name": "r", "model": {"path": "m"}, "data": {"train": [A]}}
    return Recipe.model_validate({**base, **sections})


def weighted(*extra: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"train": [{**source, "weight": 1, **more} for source, more in zip((A, B), extra, strict=True)]}}


CONFIG = "strategy.deepspeed_config"


def zero(**strategy: Any) -> dict[str, Any]:
    return {"strategy": {"type": "deepspeed", **strategy}}


def tuned(**config: Any) -> dict[str, Any]:
    return zero(stage=3, deepspeed_config=config)


def aws(**cluster: Any) -> dict[str, Any]:
    cloud = {"type": "cloud", "provider": "aws", "instance_type": "g5.xlarge", "regions": ["us-east-1"], "image": AMI}
    return {"cluster": {**cloud, **cluster}}


UBUNTU = "projects/ubuntu-os-cloud/global/images/family/ubuntu-2404-lts-amd64"
GOOGLE = {"provider": "gcp", "instance_type": "a2-highgpu-1g", "regions": ["us-central1-a"], "image": UBUNTU}
STOPPING = {"metric": "held/loss"}

BROKEN_AND_WHOLE: dict[str, list[tuple[dict[str, Any], str, dict[str, Any]]]] = {
    "weights_on_all_or_none": [({"data": {"train": [{**A, "weight": 1}, B]}}, "data.train.1", weighted({}, {}))],
    "primary_source": [
        ({"data": {"train": [{**A, "primary": True}]}}, "data.train.0.primary", weighted({"primary": True}, {})),
        ({"data": {"train": [{**A, "repeat": False}]}}, "data.train.0.repeat", weighted({}, {"repeat": False})),
        (weighted({"primary": True}, {"primary": True}), "data.train.1.primary", weighted({}, {"primary": True})),
    ],
    "source_epochs": [
        (weighted({"num_epochs": 2}, {}), "data.train.0.num_epochs", weighted({}, {"num_epochs": 2})),
        (
            weighted({}, {"num_epochs": 2, "repeat": False}),
            "data.train.1.num_epochs",
            weighted({}, {"num_epochs": 0.5}),
        ),
        (
            {"data": {"train": [A, {**B, "num_epochs": 2}]}, "train": {"max_steps": 9}},
            "data.train.1.num_epochs",
            {"data": {"train": [A, {**B, "num_epochs": 2}]}, "train": {"num_epochs": 3}},
        ),
    ],
    "one_duration": [
        ({"train": {"num_epochs": 1, "max_steps": 2}}, "train.max_steps", {"train": {"max_steps": 2}}),
        ({"train": {"max_tokens": 1, "max_steps": 2}}, "train.max_tokens", {"train": {"max_tokens": 2}}),
    ],
    "one_warmup": [
        ({"train": {"warmup_ratio": 0.1, "warmup_steps": 0}}, "train.warmup_steps", {"train": {"warmup_steps": 9}})
    ],
    "warmup_leaves_room_for_decay": [
        (
            {"train": {"lr_scheduler": "wsd", "warmup_ratio": 0.6, "decay_ratio": 0.5}},
            "train.decay_ratio",
            {"train": {"lr_scheduler": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.5}},
        )
    ],
    "deepspeed_stage": [
        (zero(stage=2, offload_param="cpu"), "strategy.offload_param", zero(stage=3, offload_param="cpu")),
        (zero(stage=3) | {"train": {"compile": True}}, "train.compile", zero(stage=2) | {"train": {"compile": True}}),
        (zero() | {"train": {"optimizer": "muon"}}, "train.optimizer", {"train": {"optimizer": "muon"}}),
    ],
    "conflicts": [
        (tuned(train_batch_size=64), f"{CONFIG}.train_batch_size", tuned(train_batch_size=32)),
        (tuned(gradient_clipping=0.5), f"{CONFIG}.gradient_clipping", tuned(gradient_clipping="auto")),
        (tuned(bf16={"enabled": False}), f"{CONFIG}.bf16.enabled", tuned(bf16={"enabled": True})),
        (tuned(fp16={"enabled": True}), f"{CONFIG}.fp16.enabled", tuned(fp16={"enabled": False})),
        (
            tuned(optimizer={"type": "Adam"}),
            f"{CONFIG}.optimizer.type",
            tuned(optimizer={"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.999]}}),
        ),
        (
            tuned(scheduler={"type": "WarmupLR"}),
            f"{CONFIG}.scheduler.type",
            tuned(gradient_accumulation_steps="auto"),
        ),
        (tuned(zero_optimization={"stage": 2}), f"{CONFIG}.zero_optimization.stage", tuned(zero_optimization={})),
        (
            tuned(zero_optimization={"zero_quantized_weights": True}),
            f"{CONFIG}.zero_optimization.zero_quantized_weights",
            tuned(zero_optimization={"sub_group_size": 1e9}),
        ),
        (
            tuned(zero_optimization={"round_robin_gradients": True}),
            f"{CONFIG}.zero_optimization.round_robin_gradients",
            zero(stage=2, deepspeed_config={"zero_optimization": {"round_robin_gradients": True}}),
        ),
        (
            tuned(zero_optimization={"overlap_comm": 1}),
            f"{CONFIG}.zero_optimization.overlap_comm",
            tuned(zero_optimization={"overlap_comm": True}),
        ),
        (
            tuned(zero_optimization={"offload_optimizer": {"device": "nvme"}}),
            f"{CONFIG}.zero_optimization.offload_optimizer.device",
            tuned(zero_optimization={"offload_optimizer": {"device": "none", "pin_memory": True}}),
        ),
        (tuned(steps_per_print=10), f"{CONFIG}.steps_per_print", {}),
    ],
    "streams_divide_batch": [
        ({"data": {"train": [A], "streams": 5}}, "data.streams", {"data": {"train": [A], "streams": 8}})
    ],
    "micro_batch_within_global": [
        (
            {"train": {"global_batch_size": 4, "micro_batch_size": 8}},
            "train.micro_batch_size",
            {"train": {"global_batch_size": 4, "micro_batch_size": 4}},
        )
    ],
    "betas_of_adamw": [
        (
            {"train": {"optimizer": "adafactor", key: value}},
            f"train.{key}",
            {"train": {"optimizer": "muon", key: value}},
        )
        for key, value in (("betas", [0.9, 0.95]), ("eps", 1e-6))
    ],
    "layers_without_adapter": [
        (
            {"model": {"path": "m", "train_layers": ["*"]}, "adapter": {}},
            "model.train_layers",
            {"model": {"path": "m", "train_layers": ["*"]}},
        )
    ],
    "optimizer_state_of_a_whole_model": [
        (
            {"model": {"path": "m", "keep_optimizer_state": True}, "adapter": {}},
            "model.keep_optimizer_state",
            {"model": {"path": "m", "keep_optimizer_state": True}},
        ),
        (
            {"model": {"path": "m", "keep_optimizer_state": True, "init": "random"}},
            "model.keep_optimizer_state",
            {"model": {"path": "m", "init": "random"}},
        ),
    ],
    "adapter_on_pretrained": [
        (
            {"model": {"path": "m", "init": "random"}, "adapter": {}},
            "adapter",
            {"model": {"path": "m", "init": "random"}},
        )
    ],
    "target_spelling": [
        ({"adapter": {"target_modules": bad}}, "adapter.target_modules", {"adapter": {"target_modules": good}})
        for bad, good in (
            ("all", "all-linear"),
            ("q_proj,v_proj", ["q_proj", "v_proj"]),
            (".*[q_proj", r".*\.(q|v)_proj"),
        )
    ],
    "dora_on_whole_weights": [
        (
            {"adapter": {"type": "qlora", "use_dora": True}},
            "adapter.use_dora",
            {"adapter": {"type": "qlora", "use_rslora": True}},
        )
    ],
    "adapters_under_deepspeed": [
        (
            {"adapter": {"type": "qlora"}, "strategy": {"type": "deepspeed", "stage": 2}},
            "adapter.type",
            {"adapter": {"type": "lora"}, "strategy": {"type": "deepspeed", "stage": 2}},
        ),
    ],
    "adapter_within_the_weights": [
        ({"adapter": {"init": "pissa", "dropout": 0.1}}, "adapter.dropout", {"adapter": {"dropout": 0.1}}),
        (
            {"adapter": {"init": "olora"}, "train": {"weight_decay": 0.1}},
            "train.weight_decay",
            {"adapter": {"init": "gaussian"}, "train": {"weight_decay": 0.1}},
        ),
    ],
    "early_stopping_metric": [
        (
            {
                "data": {"train": [A], "eval": HELD_OUT},
                "evaluate": {"every_steps": 1, "early_stopping": {"metric": metric}},
            },
            "evaluate.early_stopping.metric",
            {"data": {"train": [A], "eval": HELD_OUT}, "evaluate": {"every_steps": 1, "early_stopping": STOPPING}},
        )
        for metric in ("held", "a/loss")
    ]
    + [
        (
            {
                "data": {"train": [A], "eval": {"fraction": 0.1}},
                "evaluate": {"every_steps": 1, "early_stopping": STOPPING},
            },
            "evaluate.early_stopping.metric",
            {
                "data": {"train": [A], "eval": {"fraction": 0.1}},
                "evaluate": {"every_steps": 1, "early_stopping": {"metric": "a/loss"}},
            },
        )
    ],
    "best_by_some_metric": [
        (
            {
                "data": {"train": [A], "eval": [*HELD_OUT, B]},
                "evaluate": {"every_steps": 1},
                "checkpoint": {"keep_best": 2},
            },
            "checkpoint.keep_best",
            {
                "data": {"train": [A], "eval": HELD_OUT},
                "evaluate": {"every_steps": 1},
                "checkpoint": {"keep_best": 2},
            },
        ),
        (
            {"data": {"train": [A], "eval": HELD_OUT}, "checkpoint": {"keep_best": 2}},
            "checkpoint.keep_best",
            {"data": {"train": [A], "eval": HELD_OUT}, "checkpoint": {"keep_best": 0}},
        ),
    ],
    "early_stopping_needs_steps": [
        (
            {"data": {"train": [A], "eval": HELD_OUT}, "evaluate": {"early_stopping": STOPPING}},
            "evaluate.early_stopping",
            {"data": {"train": [A], "eval": HELD_OUT}, "evaluate": {"every_steps": 5, "early_stopping": STOPPING}},
        )
    ],
    "evaluation_has_data": [({"evaluate": {"every_steps": 5}}, "evaluate.every_steps", {"evaluate": {}})],
    "names_differ": [
        (
            {"data": {"train": [{**A, "name": "x"}, {**B, "name": "x"}]}},
            "data.train.1.name",
            {"data": {"train": [{**A, "name": "x"}, B], "eval": [{**A, "name": "x"}]}},
        ),
        (
            {"data": {"train": [A], "eval": [{**A, "name": "x"}, {**B, "name": "x"}]}},
            "data.eval.1.name",
            {"data": {"train": [A], "eval": [A, A]}},
        ),
    ],
    "hub_keys_with_hub_paths": [
        (
            {"data": {"train": [{**A, "split": "train"}]}},
            "data.train.0.split",
            {"data": {"train": [{**A, "path": "hub:acme/chats", "split": "train"}]}},
        ),
        (
            {"data": {"train": [A], "eval": [{**B, "subset": "en"}]}},
            "data.eval.0.subset",
            {"data": {"train": [A], "eval": [{**B, "path": "hub:acme/chats", "subset": "en"}]}},
        ),
    ],
    "method_reads_format": [
        (
            {"method": {"type": "cpt"}, "data": {"train": [A, {**B, "format": "chat"}]}},
            "data.train.1.format",
            {"method": {"type": "cpt"}, "data": {"train": [A, {**B, "format": "text"}]}},
        ),
        (
            {"method": {"type": "cpt"}, "data": {"train": [A], "eval": [{**B, "format": "prompt_completion"}]}},
            "data.eval.0.format",
            {"method": {"type": "sft"}, "data": {"train": [A], "eval": [{**B, "format": "prompt_completion"}]}},
        ),
        (
            {"data": {"train": [{**A, "format": "preference"}]}},
            "data.train.0.format",
            {"data": {"train": [{**A, "format": "sharegpt"}]}},
        ),
    ],
    "no_credentials_in_options": [
        (
            {"data": {"train": [{**REMOTE, "storage_options": {"anon": True, "secret": "x"}}]}},
            "data.train.0.storage_options.secret",
            {"data": {"train": [{**REMOTE, "storage_options": {"anon": True, "profile": "x"}}]}},
        ),
        (
            {"data": {"train": [A], "eval": [{**B, "storage_options": {"anon": True}}]}},
            "data.eval.0.storage_options",
            {"data": {"train": [A], "eval": [{**REMOTE, "storage_options": {"anon": True}}]}},
        ),
    ],
    "node_range": [
        (
            {"cluster": {"type": "ray", "nodes": {"min": 8, "max": 6}}},
            "cluster.nodes",
            {"cluster": {"type": "ray", "nodes": {"min": 6, "max": 6}}},
        ),
    ],
    "hosts_in_one_place": [
        ({"cluster": {"type": "ssh"}}, "cluster.hosts", {"cluster": {"type": "ssh", "hosts": ["a", "b"]}}),
        (
            {"cluster": {"type": "ssh", "hosts": ["a"], "hostfile": "hosts"}},
            "cluster.hosts",
            {"cluster": {"type": "ssh", "hostfile": "hosts"}},
        ),
        (
            {"cluster": {"type": "ssh", "hosts": ["a", "b", "a"]}},
            "cluster.hosts",
            {"cluster": {"type": "ray"}},
        ),
    ],
    "kubernetes_volumes": [
        (
            {"cluster": {**PODS, "volumes": [{"claim": "a", "path": "/data"}, {"claim": "b", "path": "/data/"}]}},
            "cluster.volumes.1.path",
            {"cluster": {**PODS, "volumes": [{"claim": "a", "path": "/data"}, {"claim": "b", "path": "/data2"}]}},
        ),
        (
            {"cluster": {**PODS, "volumes": [{"claim": "a", "path": "/mnt/ftlaunch/job"}]}},
            "cluster.volumes.0.path",
            {"cluster": {**PODS, "volumes": [{"claim": "a", "path": "/mnt/data"}]}},
        ),
        (
            {"cluster": {**PODS, "volumes": [{"claim": "a", "path": "/data/../etc"}]}},
            "cluster.volumes.0.path",
            {"cluster": {"type": "ray"}},
        ),
    ],
    "kubernetes_keys": [
        (
            {"cluster": {**PODS, "labels": {"a team": "b"}}},
            "cluster.labels",
            {"cluster": {**PODS, "labels": {"acme.com/team": "b"}}},
        ),
        (
            {"cluster": {**PODS, "resources": {"rdma/hca/8": 1}}},
            "cluster.resources",
            {"cluster": {**PODS, "resources": {"rdma/hca": 1}}},
        ),
    ],
    "kubernetes_queues": [
        (
            {"cluster": {**PODS, "queue": "gpus", "gang_scheduler": "volcano"}},
            "cluster.gang_scheduler",
            {"cluster": {**PODS, "queue": "gpus"}},
        ),
        (
            {"cluster": {**PODS, "gang_queue": "gpus"}},
            "cluster.gang_queue",
            {"cluster": {**PODS, "gang_queue": "gpus", "gang_scheduler": "volcano"}},
        ),
        (
            {"cluster": {**PODS, "gang_queue": "gpus", "gang_scheduler": "scheduler-plugins"}},
            "cluster.gang_queue",
            {"cluster": {"type": "ray"}},
        ),
    ],
    "options_of_slurm": [
        (
            {"cluster": {"type": "slurm", "options": ["--nice=1", "--time=5"]}},
            "cluster.options.1",
            {"cluster": {"type": "slurm", "options": ["--nice=1"], "time": "5"}},
        ),
        (
            {"cluster": {"type": "slurm", "options": ["--wrap=id"]}},
            "cluster.options.0",
            {"cluster": {"type": "slurm", "options": ["--exclude=node[7-9]"]}},
        ),
    ],
    "no_credentials_in_urls": [
        ({"model": {"path": "https://u:p@host/m"}}, "model.path", {"model": {"path": "https://host/m"}}),
        (
            {"data": {"train": [{"path": "https://host/a.jsonl?sig=x"}]}},
            "data.train.0.path",
            {"data": {"train": [{"path": "https://host/a.jsonl?version=x"}]}},
        ),
    ],
    "cloud_provider_keys": [
        (aws(**GOOGLE), "cluster.project", aws(**GOOGLE, project="p")),
        (aws(resource_group="g"), "cluster.resource_group", aws(identity="role")),
        (aws(tags={"ftlaunch-run": "x"}), "cluster.tags", aws(tags={"team": "x"})),
        (aws(machine={"UserData": "x"}), "cluster.machine.UserData", aws(machine={"SubnetIds": ["subnet-1"]})),
    ],
    "cloud_regions": [
        (aws(regions=["us-east-1a"]), "cluster.regions.0", aws(regions=["us-gov-west-1"])),
        (
            aws(regions=["us-east-1", "us-east-1"], image={"us-east-1": AMI}),
            "cluster.regions.1",
            aws(image={"us-east-1": AMI}),
        ),
        (
            aws(regions=["us-east-1", "eu-west-1"], image={"us-east-1": AMI}),
            "cluster.image",
            aws(regions=["us-east-1", "eu-west-1"], image={"us-east-1": AMI, "eu-west-1": AMI}),
        ),
    ],
    "cloud_images": [
        (aws(image="ubuntu"), "cluster.image", aws()),
        (aws(regions=["us-east-1", "eu-west-1"]), "cluster.image", aws(**GOOGLE, project="p")),
    ],
}


@pytest.mark.parametrize("name", [check.rule.__name__ for check in CHECKS])
def test_check(name: str) -> None:
    for broken, key, whole in BROKEN_AND_WHOLE[name]:
        (problem,) = run_checks(recipe(**broken))
        assert problem.key == key
        assert problem.message
        assert problem.remedy
        assert run_checks(recipe(**whole)) == []


def test_checks_of_broken_sections_do_not_run() -> None:
    broken = recipe(train={"global_batch_size": 4, "micro_batch_size": 8})
    assert run_checks(broken, {"train"}) == []


def test_packing_off_is_fine() -> None:
    assert run_checks(recipe(data={"train": [A], "packing": False})) == []


@pytest.mark.parametrize(
    ("sections", "keys"),
    [
        ({"adapter": {}, "train": {"learning_rate": 2e-5}}, ["train.learning_rate"]),
        ({"adapter": {}, "train": {"learning_rate": 5e-5}}, []),
        ({"train": {"learning_rate": 3e-4}}, ["train.learning_rate"]),
        ({"train": {"learning_rate": 2e-4}}, []),
        ({"model": {"path": "m", "init": "random"}, "train": {"learning_rate": 3e-3}}, []),
        ({"train": {"decay_ratio": 0.5}}, ["train.decay_ratio"]),
        ({"train": {"decay_ratio": 0.5, "lr_scheduler": "wsd"}}, []),
        ({"train": {"min_lr_ratio": 0.1, "lr_scheduler": "constant"}}, ["train.min_lr_ratio"]),
        ({"train": {"warmup_steps": 10, "max_steps": 10}}, ["train.warmup_steps"]),
        ({"train": {"warmup_steps": 9, "max_steps": 10}}, []),
    ],
)
def test_advice(sections: dict[str, Any], keys: list[str]) -> None:
    assert [problem.key for problem in advice(recipe(**sections))] == keys


def test_advice_becomes_warnings_with_a_place(load: Any) -> None:
    text = "model: {path: m}\ndata: {train: [{path: a}]}\nadapter: {}\ntrain:\n  learning_rate: 1e-5\n"
    (warning,) = load(text).warnings
    assert warning == "recipe.yaml:5: train.learning_rate: 1e-05 is low for LoRA; 1e-4 to 2e-4 is usual"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("s3://acme/tickets/*.parquet", "tickets"),
        ("s3://acme/tickets-heldout.parquet", "tickets-heldout"),
        ("data/train.jsonl.gz", "train"),
        ("data/general/*.jsonl.zst", "general"),
        ("/data/shards/part-*.parquet", "part"),
        ("/data/**/*.jsonl", "data"),
        ("s3://bucket", "bucket"),
        ("s3://bucket/folder/", "folder"),
        ("https://host/a%20b.jsonl", "a-20b"),
        ("*.jsonl", "data"),
        ("{a,b}.jsonl", "data"),
        (("x/first.arrow", "y/second.arrow"), "first"),
        ((), "data"),
    ],
)
def test_source_name(path: str | tuple[str, ...], name: str) -> None:
    assert source_name(Source(path=path)) == name
    Source(path="x", name=name)  # a made name is a valid one


def test_source_names_are_all_different_unless_given_twice() -> None:
    paths = ["a/x.jsonl", "b/x.jsonl", "c/x.jsonl"]
    sources = [Source(path=paths[0]), Source(path="q", name="x-2"), Source(path=paths[1]), Source(path=paths[2])]
    assert source_names(sources) == ("x", "x-2", "x-3", "x-4")
    assert source_names([Source(path="q", name="x"), Source(path="r", name="x")]) == ("x", "x")


def test_a_given_name_keeps_it_wherever_it_stands() -> None:
    assert source_names([Source(path="x.jsonl"), Source(path="q", name="x")]) == ("x-2", "x")


def test_eval_names() -> None:
    train = (TrainSource(path="a.jsonl"), TrainSource(path="b/a.jsonl"))
    assert eval_names(Data(train=train, eval=EvalSplit(fraction=0.1))) == ("a", "a-2")
    assert eval_names(Data(train=train, eval=(Source(path="h.jsonl"),))) == ("h",)
    assert eval_names(Data(train=train)) == ()


def test_every_key_that_contradicts_is_named():
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 1, "offload_param": {"device": "cpu"}}}
    problems = run_checks(recipe(**tuned(**config)))
    assert [problem.key.removeprefix(f"{CONFIG}.") for problem in problems] == [
        "train_batch_size",
        "zero_optimization.stage",
        "zero_optimization.offload_param.device",
    ]
    assert "8 contradicts train.global_batch_size, which makes it 32" in str(problems[0])
    [problem] = run_checks(recipe(**tuned(zero_optimization={"offload_param": {"device": "nvme"}})))
    assert "NVMe is not supported" in problem.message and problem.remedy == "set strategy.offload_param: cpu"


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"gradient_cliping": 1.0}, "did you mean gradient_clipping?"),
        ({"zero_optimization": {"overlap_com": True}}, "did you mean zero_optimization.overlap_comm?"),
        ({"wall_clock_breakdown": True}, "in zero_optimization these are: overlap_comm, "),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_an_error(config: dict[str, Any], remedy: str) -> None:
    [problem] = run_checks(recipe(**tuned(**config)))
    assert problem.message == "is not passed on"
    assert problem.remedy.startswith(remedy)
