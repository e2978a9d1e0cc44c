"""Rules that span keys and sections, one small function each, and advice that stops nothing.

A rule yields problems keyed by where the user would mend them. It runs only when the sections it reads are valid.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence, Set
from typing import NamedTuple

from . import deepspeed_config
from .checks_cloud import cloud_images, cloud_provider_keys, cloud_regions
from .checks_kubernetes import kubernetes_keys, kubernetes_queues, kubernetes_volumes
from .checks_slurm import options_of_slurm
from .credentials import no_credentials_in_options, no_credentials_in_urls
from .formats import READ_BY
from .naming import best_metric, eval_names, source_names
from .problems import Problem
from .schema import EvalSplit, Lora, Recipe, Source, Train
from .schema_cluster import SshCluster
from .schema_nodes import NodeRange
from .schema_strategy import Deepspeed

_LOW_ADAPTER_RATE = 5e-5
_HIGH_FULL_RATE = 2e-4
_DEFAULT_DECAY_RATIO = 0.2
_NAMES = re.compile(r"[\w\s,-]+")


Rule = Callable[[Recipe], Iterator[Problem]]


class Check(NamedTuple):
    """A rule and the top-level sections it reads."""

    rule: Rule
    reads: tuple[str, ...]


def weights_on_all_or_none(recipe: Recipe) -> Iterator[Problem]:
    """A source without a weight among weighted ones has no share that could be guessed."""
    sources = recipe.data.train
    if all(source.weight is None for source in sources):
        return
    for index, source in enumerate(sources):
        if source.weight is None:
            yield Problem(
                f"data.train.{index}", "no weight, while other sources have one", "give every source a weight, or none"
            )


def primary_source(recipe: Recipe) -> Iterator[Problem]:
    """`primary` and `repeat` say how epochs of weighted sources end; at most one source is primary."""
    weighted = any(source.weight is not None for source in recipe.data.train)
    primaries = 0
    for index, source in enumerate(recipe.data.train):
        primaries += source.primary
        for key, is_set in (("primary", source.primary), ("repeat", not source.repeat)):
            if is_set and not weighted:
                remedy = "give every source a weight, or leave it out: without weights each is served once per epoch"
                yield Problem(f"data.train.{index}.{key}", "means something only with weights", remedy)
        if source.primary and primaries > 1:
            yield Problem(f"data.train.{index}.primary", "a second primary source", "mark one source only")


def source_epochs(recipe: Recipe) -> Iterator[Problem]:
    """Passes of a source's own say when it ends; the source that ends the run has none, and without weights all must
    end."""
    sources, train = recipe.data.train, recipe.train
    weighted = any(source.weight is not None for source in sources)
    primary = next((index for index, source in enumerate(sources) if source.primary), 0)
    endless = train.num_epochs is None and (train.max_steps is not None or train.max_tokens is not None)
    for index, source in enumerate(sources):
        key = f"data.train.{index}.num_epochs"
        if source.num_epochs is None:
            continue
        if weighted and index == primary:
            yield Problem(key, "the run's epochs are counted on this source", "set train.num_epochs, or leave it out")
        elif weighted and not source.repeat:
            yield Problem(key, "repeat: false says already when this source ends", "leave one out")
        elif not weighted and endless:
            remedy = "count the run in epochs (train.num_epochs), or give every source a weight"
            yield Problem(key, "the other sources have no end: train.num_epochs is not given", remedy)


def one_duration(recipe: Recipe) -> Iterator[Problem]:
    """Epochs, steps or tokens: the first that is given rules, so a second one is a contradiction."""
    given = [key for key in ("num_epochs", "max_steps", "max_tokens") if getattr(recipe.train, key) is not None]
    for key in given[1:]:
        yield Problem(f"train.{key}", f"a second duration beside {given[0]}", "keep one of them")


def one_warmup(recipe: Recipe) -> Iterator[Problem]:
    """Warm-up is said once."""
    if recipe.train.warmup_steps is not None and recipe.train.warmup_ratio > 0:
        yield Problem("train.warmup_steps", "a second warm-up beside warmup_ratio", "keep one of them")


def warmup_leaves_room_for_decay(recipe: Recipe) -> Iterator[Problem]:
    """wsd warms up, stays, then decays: the shares must fit into one run."""
    train = recipe.train
    total = train.warmup_ratio + train.decay_ratio
    if train.lr_scheduler == "wsd" and total > 1:
        yield Problem("train.decay_ratio", f"warmup_ratio + decay_ratio is {total:g}", "it must not be above 1")


def streams_divide_batch(recipe: Recipe) -> Iterator[Problem]:
    """Every step takes the same number of sequences from every stream."""
    streams, batch = recipe.data.streams, recipe.train.global_batch_size
    if streams is not None and batch % streams:
        divisors = [str(number) for number in range(1, batch + 1) if batch % number == 0]
        message = f"{streams} streams do not divide train.global_batch_size ({batch})"
        yield Problem("data.streams", message, f"one of {', '.join(divisors[-8:])}")


def micro_batch_within_global(recipe: Recipe) -> Iterator[Problem]:
    """A forward pass cannot take more sequences than the whole step has."""
    micro, batch = recipe.train.micro_batch_size, recipe.train.global_batch_size
    if micro > batch:
        message = f"{micro} is above global_batch_size ({batch})"
        yield Problem("train.micro_batch_size", message, "lower it, or raise global_batch_size")


def betas_of_adamw(recipe: Recipe) -> Iterator[Problem]:
    """Adafactor has no first moment, and a decay rate and an epsilon of its own."""
    for key in ("betas", "eps") if recipe.train.optimizer == "adafactor" else ():
        if getattr(recipe.train, key) != Train.model_fields[key].default:
            yield Problem(f"train.{key}", "means nothing to adafactor", "leave it out, or take optimizer: adamw")


def layers_without_adapter(recipe: Recipe) -> Iterator[Problem]:
    """An adapter freezes the whole base; training some layers as well is another thing."""
    if recipe.model.train_layers and recipe.adapter is not None:
        remedy = "leave one out; adapter.modules_to_save trains whole modules beside the adapter"
        yield Problem("model.train_layers", "not together with an adapter", remedy)


def adapter_on_pretrained(recipe: Recipe) -> Iterator[Problem]:
    """An adapter corrects weights that know something."""
    if recipe.model.init == "random" and recipe.adapter is not None:
        remedy = "leave the adapter out, or start from pretrained weights"
        yield Problem("adapter", "an adapter on a randomly initialised model", remedy)


def optimizer_state_of_a_whole_model(recipe: Recipe) -> Iterator[Problem]:
    """Moments belong to weights that are there, and that are trained."""
    if not recipe.model.keep_optimizer_state:
        return
    key = "model.keep_optimizer_state"
    if recipe.adapter is not None:
        yield Problem(key, "an adapter's tensors are new, and have no state", "leave one of the two out")
    if recipe.model.init == "random":
        yield Problem(key, "weights that are drawn have no state", "leave it out, or start from pretrained weights")


def target_spelling(recipe: Recipe) -> Iterator[Problem]:
    """A single text is a regular expression: it must be one, and a module's bare name would fit no whole name."""
    if recipe.adapter is None or not isinstance(targets := recipe.adapter.target_modules, str):
        return
    key = "adapter.target_modules"
    try:
        re.compile(targets)
    except re.error as error:
        yield Problem(key, f"not a regular expression: {error}", "write all-linear, or a list as [q_proj, v_proj]")
        return
    if _NAMES.fullmatch(targets) and targets != "all-linear":
        names = ", ".join(re.split(r"[\s,]+", targets))
        message = "a text is a regular expression for whole names of modules, and this one fits none"
        yield Problem(key, message, f"write a list, [{names}], or all-linear")


def adapter_within_the_weights(recipe: Recipe) -> Iterator[Problem]:
    """What starts as the principal part of the weights must not be dropped or decayed: that would undo the model."""
    adapter = recipe.adapter
    if adapter is None or not adapter.starts_within:
        return
    if adapter.dropout:
        message = f"with init: {adapter.init} dropout would drop principal parts of the model itself"
        yield Problem("adapter.dropout", message, "leave it out, or take init: kaiming")
    if recipe.train.weight_decay:
        message = f"with adapter.init: {adapter.init} decay would pull principal parts of the model itself to zero"
        yield Problem("train.weight_decay", message, "leave it out, or take adapter.init: kaiming")


def best_by_some_metric(recipe: Recipe) -> Iterator[Problem]:
    """Which checkpoints are best must be told by one loss, which is measured now and then."""
    if not recipe.checkpoint.keep_best:
        return
    if best_metric(recipe) is None:
        remedy = "name one with evaluate.early_stopping.metric, or have one eval set in data.eval"
        yield Problem("checkpoint.keep_best", "there is no single held-out loss to tell the best by", remedy)
    elif recipe.evaluate.every_steps is None:
        yield Problem("checkpoint.keep_best", "nothing is measured between the saves", "set evaluate.every_steps")


def dora_on_whole_weights(recipe: Recipe) -> Iterator[Problem]:
    """DoRA measures the lengths of the weights' rows in every step."""
    if recipe.adapter is not None and recipe.adapter.type == "qlora" and recipe.adapter.use_dora:
        yield Problem("adapter.use_dora", "not with a base in 4 bits", "leave it out, or take type: lora")


def early_stopping_metric(recipe: Recipe) -> Iterator[Problem]:
    """The metric must be the loss of an eval set that exists."""
    stopping = recipe.evaluate.early_stopping
    if stopping is None:
        return
    metrics = [f"{name}/loss" for name in eval_names(recipe.data)]
    if stopping.metric not in metrics:
        remedy = f"one of {', '.join(metrics)}" if metrics else "data.eval has no eval set; add one"
        yield Problem("evaluate.early_stopping.metric", f"no eval set gives {stopping.metric!r}", remedy)


def early_stopping_needs_steps(recipe: Recipe) -> Iterator[Problem]:
    """Without evaluations on the way there is nothing to stop at."""
    if recipe.evaluate.early_stopping is not None and recipe.evaluate.every_steps is None:
        remedy = "set evaluate.every_steps"
        yield Problem("evaluate.early_stopping", "needs evaluations during training", remedy)


def evaluation_has_data(recipe: Recipe) -> Iterator[Problem]:
    """A cadence without anything to evaluate would be ignored."""
    if recipe.evaluate.every_steps is not None and not eval_names(recipe.data):
        remedy = "add data.eval (sources, or {fraction: 0.02}), or leave it out"
        yield Problem("evaluate.every_steps", "there is nothing to evaluate: data.eval is empty", remedy)


def names_differ(recipe: Recipe) -> Iterator[Problem]:
    """Reports and metrics are keyed by source name."""
    held_out: Sequence[Source] = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    for key, sources in (("data.train", recipe.data.train), ("data.eval", held_out)):
        names = source_names(sources)
        counts = Counter(names)
        for index, name in enumerate(names):
            if counts[name] > 1 and name in names[:index]:
                yield Problem(f"{key}.{index}.name", f"a second source named {name}", "give it another name")


def hub_keys_with_hub_paths(recipe: Recipe) -> Iterator[Problem]:
    """Files have no splits and subsets; they are named."""
    held_out: Sequence[Source] = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    for key, sources in (("data.train", recipe.data.train), ("data.eval", held_out)):
        for index, source in enumerate(sources):
            if all(path.startswith("hub:") for path in source.paths):
                continue
            for name, value in (("split", source.split), ("subset", source.subset)):
                if value is not None:
                    remedy = "name the files of the part you want in path"
                    yield Problem(f"{key}.{index}.{name}", "means something only with path: hub:ORG/NAME", remedy)


def method_reads_format(recipe: Recipe) -> Iterator[Problem]:
    """A method learns from some row formats only; formats that are found from columns are looked at with the data."""
    reads = READ_BY[recipe.method.type]
    held_out: Sequence[Source] = () if isinstance(recipe.data.eval, EvalSplit) else recipe.data.eval
    for key, sources in (("data.train", recipe.data.train), ("data.eval", held_out)):
        for index, source in enumerate(sources):
            if source.format is not None and source.format not in reads:
                message = f"method {recipe.method.type} reads {', '.join(reads)}, not {source.format}"
                yield Problem(f"{key}.{index}.format", message, "take another method, or another format")


def deepspeed_stage(recipe: Recipe) -> Iterator[Problem]:
    """Only ZeRO-3 has parameters of its own to put elsewhere, and takes blocks apart that are compiled whole."""
    strategy = recipe.strategy
    if not isinstance(strategy, Deepspeed):
        return
    if strategy.offload_param != "none" and strategy.stage != 3:
        message = f"in stage {strategy.stage} every rank computes with all parameters"
        yield Problem("strategy.offload_param", message, "set strategy.stage to 3, or leave it out")
    if recipe.train.compile and strategy.stage == 3:
        remedy = "leave it out, or take strategy {type: fsdp} or stage 2"
        yield Problem("train.compile", "not together with DeepSpeed's stage 3", remedy)
    if recipe.train.optimizer != "adamw":
        message = "DeepSpeed holds tensors in flat pieces, which only adamw is made for"
        yield Problem("train.optimizer", message, "set train.optimizer: adamw, or take strategy {type: fsdp}")


def adapters_under_deepspeed(recipe: Recipe) -> Iterator[Problem]:
    """ZeRO takes weights apart in flat pieces."""
    adapter, strategy = recipe.adapter, recipe.strategy
    if adapter is not None and adapter.type == "qlora" and isinstance(strategy, Deepspeed):
        remedy = "take strategy {type: fsdp}, or adapter.type: lora"
        yield Problem("adapter.type", "a base in 4 bits is not laid out by DeepSpeed", remedy)


def node_range(recipe: Recipe) -> Iterator[Problem]:
    """At least so many nodes, at most so many."""
    nodes = recipe.cluster.nodes
    if isinstance(nodes, NodeRange) and nodes.min > nodes.max:
        yield Problem("cluster.nodes", f"min ({nodes.min}) is above max ({nodes.max})", "swap them, or give one number")


def hosts_in_one_place(recipe: Recipe) -> Iterator[Problem]:
    """An ssh cluster's hosts are listed in the recipe, or in a file; each once."""
    cluster = recipe.cluster
    if not isinstance(cluster, SshCluster):
        return
    if bool(cluster.hosts) == (cluster.hostfile is not None):
        message = "given along with hostfile" if cluster.hosts else "missing: which hosts to run on"
        yield Problem("cluster.hosts", message, "list the hosts, or name a file with cluster.hostfile")
    for host in dict.fromkeys(cluster.hosts):
        if cluster.hosts.count(host) > 1:
            yield Problem("cluster.hosts", f"{host} is named more than once", "name each host once")


CHECKS: tuple[Check, ...] = (
    Check(options_of_slurm, ("cluster",)),
    Check(hosts_in_one_place, ("cluster",)),
    Check(kubernetes_volumes, ("cluster",)),
    Check(kubernetes_keys, ("cluster",)),
    Check(kubernetes_queues, ("cluster",)),
    Check(cloud_provider_keys, ("cluster",)),
    Check(cloud_regions, ("cluster",)),
    Check(cloud_images, ("cluster",)),
    Check(node_range, ("cluster",)),
    Check(weights_on_all_or_none, ("data",)),
    Check(primary_source, ("data",)),
    Check(source_epochs, ("data", "train")),
    Check(one_duration, ("train",)),
    Check(one_warmup, ("train",)),
    Check(warmup_leaves_room_for_decay, ("train",)),
    Check(streams_divide_batch, ("data", "train")),
    Check(micro_batch_within_global, ("train",)),
    Check(betas_of_adamw, ("train",)),
    Check(layers_without_adapter, ("model", "adapter")),
    Check(adapter_on_pretrained, ("model", "adapter")),
    Check(optimizer_state_of_a_whole_model, ("model", "adapter")),
    Check(target_spelling, ("adapter",)),
    Check(adapter_within_the_weights, ("adapter", "train")),
    Check(best_by_some_metric, ("checkpoint", "evaluate", "data")),
    Check(dora_on_whole_weights, ("adapter",)),
    Check(adapters_under_deepspeed, ("adapter", "strategy")),
    Check(early_stopping_metric, ("evaluate", "data")),
    Check(early_stopping_needs_steps, ("evaluate",)),
    Check(evaluation_has_data, ("evaluate", "data")),
    Check(names_differ, ("data",)),
    Check(hub_keys_with_hub_paths, ("data",)),
    Check(method_reads_format, ("method", "data")),
    Check(deepspeed_stage, ("strategy", "train")),
    Check(deepspeed_config.conflicts, ("strategy", "train", "model")),
    Check(no_credentials_in_options, ("data",)),
    Check(no_credentials_in_urls, ("data", "model", "checkpoint")),
)


def run_checks(recipe: Recipe, broken: Set[str] = frozenset(), without: Collection[Rule] = ()) -> list[Problem]:
    """The problems of all rules that read none of the `broken` sections, and that the command does not do `without`."""
    checks = (check for check in CHECKS if not broken & set(check.reads) and check.rule not in without)
    return [problem for check in checks for problem in check.rule(recipe)]


def advice(recipe: Recipe) -> Iterator[Problem]:
    """What is allowed and rarely meant."""
    yield from _learning_rate_advice(recipe)
    yield from _schedule_advice(recipe)


def _learning_rate_advice(recipe: Recipe) -> Iterator[Problem]:
    rate = recipe.train.learning_rate
    if isinstance(recipe.adapter, Lora) and rate < _LOW_ADAPTER_RATE:
        yield Problem("train.learning_rate", f"{rate:g} is low for LoRA", "1e-4 to 2e-4 is usual")
    if recipe.adapter is None and recipe.model.init == "pretrained" and rate > _HIGH_FULL_RATE:
        yield Problem("train.learning_rate", f"{rate:g} is high for full fine-tuning", "1e-5 to 5e-5 is usual")


def _schedule_advice(recipe: Recipe) -> Iterator[Problem]:
    train = recipe.train
    if train.decay_ratio != _DEFAULT_DECAY_RATIO and train.lr_scheduler != "wsd":
        yield Problem("train.decay_ratio", f"has no effect with lr_scheduler {train.lr_scheduler}", "only wsd uses it")
    if train.min_lr_ratio and train.lr_scheduler == "constant":
        yield Problem("train.min_lr_ratio", "has no effect with lr_scheduler constant", "the rate never falls")
    if train.warmup_steps and train.max_steps and train.warmup_steps >= train.max_steps:
        message = f"warm-up ({train.warmup_steps}) lasts as long as the run ({train.max_steps} steps)"
        yield Problem("train.warmup_steps", message, "the peak learning rate is never reached")
