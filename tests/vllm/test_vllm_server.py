"""Real vLLM servers over HTTP."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.run_inputs import Task, assert_metrics_agree, make_task, steady_metrics
from tests.support.vllm_server_cases import over_http
from tests.support.vllm_servers import KEY, ServerProcess
from tests.support.vllm_support import SIZES, SMALL, TEACHER, needs_vllm, vllm_commands

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"), student=SIZES, teacher=TEACHER)


@pytest.fixture(scope="module")
def servers(task: Task) -> Iterator[list[ServerProcess]]:
    """Two servers, of one worker and of two."""
    settings = (*SMALL, "rollout.max_new_tokens=64")
    found = [
        ServerProcess(
            task.config, task.directory / f"server-{n}.log", (*settings, f"rollout.vllm_server.tensor={n + 1}")
        )
        for n in range(2)
    ]
    try:
        for server in found:
            server.start()
        for server in found:
            server.wait_until_ready()
        yield found
    finally:
        for server in found:
            server.kill()


def status_of(url: str, key: str = "", body: bytes | None = None) -> int:
    request = urllib.request.Request(url, data=body, headers={"authorization": f"Bearer {key}"} if key else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("path", ["/tropd/info", "/tropd/start", "/v1/models", "/metrics", "/nonsense"])
def test_nothing_but_the_sign_of_life_is_open_to_those_without_the_key(servers, path):
    for wrong in ("", "another key"):
        assert status_of(servers[0].url + path, wrong, b"{}") == 401
    assert status_of(servers[0].url + "/health") == 200
    assert status_of(servers[0].url + "/tropd/info", KEY) == 200


@pytest.mark.parametrize("path", ["/collective_rpc", "/update_weights", "/pause", "/reset_prefix_cache"])
def test_the_routes_that_let_anyone_run_code_in_the_server_are_not_there(servers, path):
    assert status_of(servers[0].url + path, KEY, b"{}") == 404


def test_after_every_publish_servers_and_trainer_agree_on_every_log_prob(task, servers, tmp_path):
    urls = [server.url for server in servers]
    vllm_commands().call(over_http, str(task.student), urls, KEY, str(tmp_path / "weights"), 2, ranks=2)


def test_a_run_with_servers_trains(task, servers, tmp_path):
    urls = json.dumps([server.url for server in servers])
    settings = ("rollout.engine=vllm_server", f"rollout.vllm_server.urls={urls}", "train.steps=2", *SMALL)
    outcome = (
        vllm_commands()
        .run("train", task.config, f"run_dir={tmp_path}/run", *settings, TROPD_API_KEY=KEY)
        .expect_success()
    )
    rows = steady_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["logprob_gap_max"] < 1e-4 and row["sequences"] == 9 for row in rows)
    assert KEY not in outcome.output and KEY not in Path(tmp_path / "run" / "config.yaml").read_text()


def test_servers_write_the_next_batch_while_the_trainer_learns(task, servers, tmp_path):
    urls = json.dumps([server.url for server in servers])
    settings = ("rollout.engine=vllm_server", f"rollout.vllm_server.urls={urls}", *SMALL, "rollout.ahead=1")
    learning = ("method.ppo_clip=0.2", "optimizer.lr=2.0e-2", "train.steps=4", "checkpoint.every=2")
    command = ("train", task.config, *settings, *learning, "evaluate.prompts=null", "report.samples=0")
    vllm_commands().run(*command, f"run_dir={tmp_path}/run", TROPD_API_KEY=KEY).expect_success()
    rows = steady_metrics(tmp_path / "run")
    assert [(row["staleness_mean"], row["staleness_max"]) for row in rows] == [(0, 0), (1, 1), (1, 1), (1, 1)]
    # the servers' log-probs are of the weights that wrote the tokens: so are the trainer's old ones
    assert all(row["logprob_gap_max"] < 1e-4 for row in rows)
    times = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    hidden = [row["time_rollout_hidden"] for row in times]
    assert min(hidden[:3]) > 0.0 and hidden[3] == 0.0, "in the last step nothing is left to write"

    shutil.copytree(tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "half/checkpoints/step-00000002")
    shutil.copy(tmp_path / "run" / "metrics.jsonl", tmp_path / "half")
    outcome = vllm_commands().run(*command, f"run_dir={tmp_path}/half", TROPD_API_KEY=KEY).expect_success()
    assert "(2 steps done)" in outcome.output
    assert_metrics_agree(steady_metrics(tmp_path / "half"), rows)
