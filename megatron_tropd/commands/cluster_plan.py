"""Planning a run on a cluster: ``tropd check --cluster`` prints the layouts of a configuration, then the best ones."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megatron_tropd.commands.fitting import describe_job, fit
from megatron_tropd.config.run import RunConfig
from megatron_tropd.planning.cluster import ClusterJob, best, chosen, read_cluster
from megatron_tropd.planning.cluster_report import print_requested, ranking
from megatron_tropd.report.terminal import say
from megatron_tropd.setup.adapters import check_adapters
from megatron_tropd.setup.validate import check_layouts, check_method, read_architectures


def job_of(config: RunConfig, cluster: Path) -> ClusterJob:
    """Read what the plan needs: the cluster, and of the models ``config.json`` alone.

    Raises:
        TropdError: one of them is wrong, or the configuration's layouts fit neither the models nor the cluster.
    """
    check_method(config)
    described = read_cluster(cluster)
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    check_adapters(config, student)
    config.check_world(described.gpus)
    return describe_job(config, student, teacher, described)


def print_cluster_plan(config: RunConfig, cluster: Path) -> None:
    """Print the plan to standard output; what the configuration leaves open is chosen for the cluster."""
    fitted = fit(config, read_cluster(cluster))
    for line in fitted.lines():
        say(line)
    job, console = job_of(fitted.config, cluster), Console()
    print_requested(console, job, chosen(job))
    console.print(ranking(best(job)))
