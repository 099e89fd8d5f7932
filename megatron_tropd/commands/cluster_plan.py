"""Planning a run on a cluster: ``tropd check --cluster`` prints the layouts of a configuration, then the best ones."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megatron_tropd.config.run import RunConfig
from megatron_tropd.planning.cluster import ClusterJob, best, chosen, read_cluster
from megatron_tropd.planning.cluster_report import print_requested, ranking
from megatron_tropd.setup.adapters import adapter_spec, check_adapters
from megatron_tropd.setup.validate import check_layouts, check_method, read_architectures, sequences_per_step


def job_of(config: RunConfig, cluster: Path) -> ClusterJob:
    """Read what the plan needs: the cluster, and of the models ``config.json`` alone.

    Raises:
        TropdError: one of them is wrong, or the configuration's layouts fit neither the models nor the cluster.
    """
    method, described = check_method(config), read_cluster(cluster)
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    check_adapters(config, student)
    config.check_world(described.gpus)
    return ClusterJob(
        dtype=config.dtype,
        student_section=config.student,
        teacher_section=config.teacher,
        data=config.data,
        rollout=config.rollout,
        train=config.train,
        optimizer=config.optimizer,
        cluster=described,
        method=method,
        student=student,
        teacher=teacher,
        sequences=sequences_per_step(config, method),
        adapters=adapter_spec(config.student, student),
    )


def print_cluster_plan(config: RunConfig, cluster: Path) -> None:
    """Print the plan to standard output."""
    job, console = job_of(config, cluster), Console()
    print_requested(console, job, chosen(job))
    console.print(ranking(best(job)))
