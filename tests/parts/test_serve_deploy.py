"""What Ray Serve and vLLM are told, and what is told of them: against a dashboard of our own."""

import json
import os
import socket
from dataclasses import replace
from http.server import ThreadingHTTPServer
from typing import Any

import pytest

from cluster.models import served_base_name
from configs.errors import AccessError, ClusterError
from configs.loader import load_chatbot
from configs.schema import ChatbotConfig, ModelConfig, ScalingConfig, ServeConfig
from serve.deploy import deploy, endpoint, failure_reason
from serve.engine import BESIDE, GRAPH_SIZES, engine_arguments, engine_environment, graph_sizes, take_threads
from serve.keys import KeyFile
from tests.helpers.json_door import JsonDoor, listening

MESSAGES = "\n".join(f"line {number}" for number in range(40))


class Dashboard(ThreadingHTTPServer):
    """Stands where Ray's dashboard stands: keeps what Serve is told, and says what the test wants it to say."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), DashboardDoor)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.applications: dict[str, Any] = {}
        self.after_put: list[dict[str, Any]] = []
        self.put: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.refuses_with = 200
        self.cards = [{"machine": "head", "card": "card0", "pool": "serve"}]


class DashboardDoor(JsonDoor):
    server: Dashboard

    def do_GET(self) -> None:
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path.startswith("/api/jobs"):
            self.send_json(200, [])
        elif self.path.startswith("/nodes"):
            self.send_json(200, {"data": {"summary": [{"raylet": {"state": "ALIVE", "labels": labels}} for labels in self.server.cards]}})
        else:
            if self.server.after_put and self.server.put:
                self.server.applications = {"chat": self.server.after_put.pop(0)}
            self.send_json(200, {"applications": self.server.applications})

    def do_PUT(self) -> None:
        self.server.put.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_json(self.server.refuses_with, {})

    def do_DELETE(self) -> None:
        self.server.applications = {}
        self.send_json(200, {})


@pytest.fixture
def dashboard():
    server = Dashboard()
    with listening(server):
        yield server


@pytest.fixture
def bot(home, tmp_path) -> ChatbotConfig:
    (home / "models" / "smollm2-135m").mkdir(parents=True)  # as if it had been converted
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    (tmp_path / "bot.yaml").write_text(f"name: bot\ndata:\n  source: chats.jsonl\nserve:\n  port: {port}\n  max_num_seqs: 8\n")
    return load_chatbot(tmp_path / "bot.yaml")


def test_serve_is_told_the_whole_config(bot, up, dashboard):
    assert deploy(bot, up(dashboard.url), print, wait=False) == endpoint(bot) == f"http://127.0.0.1:{bot.serve.port}/v1"
    told = dashboard.put[0]
    assert told["http_options"] == {"host": "127.0.0.1", "port": bot.serve.port}
    application = told["applications"][0]
    assert (application["name"], application["route_prefix"], application["import_path"]) == ("chat", "/", "serve.app:build")
    arguments = application["args"]
    assert (ModelConfig(**arguments["model"]), ServeConfig(**arguments["serve"])) == (bot.model, bot.serve)
    growth = application["deployments"][0]["autoscaling_config"]
    assert (growth["min_replicas"], growth["initial_replicas"], growth["max_replicas"]) == (1, 1, 1)
    assert application["args"]["base_name"] == "smollm2-135m"
    assert application["args"]["gpu_share"] is None
    assert dashboard.tokens == {"Bearer token"}


def test_deploy_waits_until_the_engine_runs(bot, up, dashboard, monkeypatch):
    monkeypatch.setattr("serve.deploy.POLL_S", 0.001)
    dashboard.after_put = [{"status": "DEPLOYING"}, {"status": "DEPLOYING"}, {"status": "RUNNING"}]
    said = []
    deploy(bot, up(dashboard.url), said.append)
    assert said == ["fetching the base model"] + ["the engine is starting"] * 2


def test_an_engine_that_does_not_start_is_refused_with_its_own_last_words(bot, up, dashboard):
    dashboard.after_put = [{"status": "DEPLOY_FAILED", "message": "short", "deployments": {"engine": {"message": MESSAGES}}}]
    with pytest.raises(ClusterError, match=r"(?s)the engine did not start \(DEPLOY_FAILED\).*line 39"):
        deploy(bot, up(dashboard.url), print)


def test_an_address_that_others_reach_is_served_with_a_key_alone(bot, up, dashboard):
    opened = bot.model_copy(update={"serve": bot.serve.model_copy(update={"host": "0.0.0.0"})})
    with pytest.raises(AccessError, match=r"(?s)0\.0\.0\.0 is not served.*keys create"):
        deploy(opened, up(dashboard.url), print, wait=False)
    assert dashboard.put == []
    KeyFile().create("alice", lifetime_s=-1)
    with pytest.raises(AccessError):
        deploy(opened, up(dashboard.url), print, wait=False)
    KeyFile().create("bob")
    deploy(opened, up(dashboard.url), print, wait=False)
    assert dashboard.put[0]["http_options"]["host"] == "0.0.0.0"


def test_engines_can_sleep_where_they_keep_to_the_heads_serve_cards(bot, up, dashboard):
    """The arbiter hears of those alone."""
    KeyFile().create("alice")

    def told(idle_engine: str, gpu: bool = False, guests: bool = False, most: int = 1) -> tuple[bool, bool]:
        cards = ({"card": "card0", "pool": "serve", **({"gpu-share": "1"} if gpu else {})},)
        machine = {"lending": {"enabled": True, "idle_engine": idle_engine}}
        session = replace(up(dashboard.url), cards=cards, machine=machine)
        scaling = bot.serve.scaling.model_copy(update={"use_train_cards": guests, "max_replicas": most})
        deploy(bot.model_copy(update={"serve": bot.serve.model_copy(update={"scaling": scaling})}), session, print, wait=False)
        arguments = dashboard.put[-1]["applications"][0]["args"]
        return arguments["sleeps"], arguments["only_head"]

    assert told("sleep") == told("auto", gpu=True) == (True, True)
    assert told("auto") == told("stop", gpu=True) == told("sleep", guests=True) == (False, False)
    dashboard.cards.append({"machine": "desk", "card": "desk-card0", "pool": "serve"})
    assert told("sleep") == (False, False)
    dashboard.cards[-1]["machine"] = "head"
    assert (told("sleep"), told("sleep", most=2)) == ((True, True), (False, False)), "of two, a request would wake the one that sleeps"


def test_behind_haproxy_engines_of_joined_machines_answer_only_where_the_endpoint_is_open(bot, up, dashboard):
    KeyFile().create("alice")
    dashboard.cards = [{"machine": "desk", "card": "desk-card0", "pool": "serve"}]
    session = replace(up(dashboard.url), has_haproxy=True)
    with pytest.raises(ClusterError, match=r"(?s)cannot run.*1 of machines that joined.*serve.host=0\.0\.0\.0"):
        deploy(bot, session, print, wait=False)
    opened = bot.model_copy(update={"serve": bot.serve.model_copy(update={"host": "0.0.0.0"})})
    deploy(opened, session, print, wait=False)
    dashboard.cards.append({"machine": "head", "card": "card0", "pool": "serve"})
    deploy(bot, session, print, wait=False)
    deploy(bot, replace(session, has_haproxy=False), print, wait=False)
    assert [told["applications"][0]["args"]["only_head"] for told in dashboard.put] == [False, True, False]


def test_haproxy_asks_engines_at_127_0_0_1_so_another_address_is_refused(bot, up, dashboard):
    KeyFile().create("alice")
    elsewhere = bot.model_copy(update={"serve": bot.serve.model_copy(update={"host": "127.0.0.2"})})
    with pytest.raises(ClusterError, match=r"(?s)127\.0\.0\.2 is not served.*serve.host=0\.0\.0\.0"):
        deploy(elsewhere, replace(up(dashboard.url), has_haproxy=True), print, wait=False)
    assert dashboard.put == []
    deploy(elsewhere, up(dashboard.url), print, wait=False)
    assert dashboard.put


def scaled(bot: ChatbotConfig, **settings: Any) -> ChatbotConfig:
    return bot.model_copy(update={"serve": bot.serve.model_copy(update={"scaling": ScalingConfig(**settings)})})


def test_engines_that_have_no_card_are_refused_and_no_more_are_asked_for_than_cards(bot, up, dashboard):
    with pytest.raises(ClusterError, match=r"(?s)min_replicas=2 engines cannot run.*there is 1 of serve"):
        deploy(scaled(bot, min_replicas=2, max_replicas=2), up(dashboard.url), print, wait=False)
    assert dashboard.put == []
    deploy(scaled(bot, max_replicas=4), up(dashboard.url), print, wait=False)
    deploy(scaled(bot, min_replicas=0, max_replicas=1), up(dashboard.url), print, wait=False)
    fixed, asleep = (put["applications"][0] for put in dashboard.put)
    assert fixed["deployments"][0]["autoscaling_config"]["max_replicas"] == 1
    growth = asleep["deployments"][0]["autoscaling_config"]
    assert (growth["min_replicas"], growth["initial_replicas"], growth["max_replicas"]) == (0, 1, 1)
    assert fixed["args"] == asleep["args"], "other arguments would replace the engine"


def test_after_a_failure_the_same_config_is_tried_again(bot, up, dashboard):
    dashboard.applications = {"chat": {"status": "DEPLOY_FAILED", "message": "no memory"}}
    deploy(bot, up(dashboard.url), print, wait=False)
    assert dashboard.applications == {}, "to Serve the same application is no news: it must be gone first"
    assert len(dashboard.put) == 1


def test_a_taken_port_is_refused_before_serve_is_told(bot, up, dashboard):
    with socket.socket() as door:
        door.bind(("127.0.0.1", bot.serve.port))
        door.listen()
        with pytest.raises(ClusterError, match=rf"(?s)port {bot.serve.port} \(serve.port\) is held by.*serve.port={bot.serve.port + 1}"):
            deploy(bot, up(dashboard.url), print, wait=False)
        assert dashboard.put == []
        dashboard.applications = {"chat": {"status": "RUNNING"}}
        deploy(bot, up(dashboard.url), print, wait=False)
        assert len(dashboard.put) == 1, "a port that our own application holds is no obstacle"


def test_what_serve_refuses_is_an_error(bot, up, dashboard):
    dashboard.refuses_with = 500
    with pytest.raises(ClusterError, match="Ray Serve refused the application"):
        deploy(bot, up(dashboard.url), print, wait=False)


def test_a_dashboard_that_does_not_answer_is_an_error_and_no_traceback(bot, up, command):
    up()
    for words in (["cluster", "status"], ["serve", "bot.yaml"], ["serve", "status"]):
        ended = command(*words)
        assert (ended.status, ended.err.splitlines()[0][:6]) == (2, "error:")


def test_status_lists_versions_and_tells_why_an_engine_failed(command, up, dashboard, registry, register):
    register(scores={"loss": 0.5, "eval_loss": 0.25})
    registry.promote("helpdesk:1")
    dashboard.applications = {"chat": {"status": "DEPLOY_FAILED", "message": "KeyError: list[int] in [/opt/vllm] failed"}}
    up(dashboard.url, registry.url)
    ended = command("serve", "status")
    assert ended.status == 0
    assert ended.out.splitlines()[:1] == ["engines  DEPLOY_FAILED:   KeyError: list[int] in [/opt/vllm] failed"]
    assert [word for word in ("helpdesk:1", "live", "smollm2-135m", "0.250") if word not in ended.out] == []


def test_status_of_the_cluster_names_cards_services_and_jobs(command, up, dashboard):
    up(dashboard.url, dashboard.url)
    ended = command("cluster", "status")
    assert ended.status == 0
    assert [word for word in ("card0", "card1", "train", "dashboard", dashboard.url, "python -m serve") if word not in ended.out] == []


def test_the_base_is_asked_for_by_its_hub_id_or_its_folders_name(home, tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert served_base_name("meta-llama/Meta-Llama-3-8B-Instruct") == "meta-llama/Meta-Llama-3-8B-Instruct"
    for name in (str(tmp_path / "models" / "mine"), "models/mine", "./models/mine/", "models/../models/mine", "~/models/mine"):
        assert served_base_name(name) == "mine"


def test_the_reason_of_a_failure_is_the_end_of_the_longest_message():
    application = {"message": "Deploying failed.", "deployments": {"engine": {"message": f"{MESSAGES}\n\n"}, "other": {}}}
    lines = failure_reason(application).splitlines()
    assert lines == [f"  line {number}" for number in range(28, 40)]
    assert failure_reason({}) == ""
    assert failure_reason({"message": "alone"}) == "  alone"


def pairs(arguments: list[str]) -> dict[str, str | None]:
    """Read a command line as options with their values."""
    return {
        word: None if number + 1 == len(arguments) or arguments[number + 1].startswith("--") else arguments[number + 1]
        for number, word in enumerate(arguments)
        if word.startswith("--")
    }


SERVE = ServeConfig(max_lora_rank=32, max_num_seqs=8, gpu_memory_share=0.9, quantization="fp8")


def test_an_engine_on_the_cpu_is_eager_and_takes_nothing_of_a_gpu(tmp_path):
    options = pairs(engine_arguments(ModelConfig(precision="bf16"), SERVE, tmp_path, "base", None))
    assert options == {
        "--model": str(tmp_path),
        "--served-model-name": "base",
        "--dtype": "bfloat16",
        "--max-model-len": "2048",
        "--max-num-seqs": "8",
        "--max-lora-rank": "32",
        "--max-loras": "4",
        "--max-cpu-loras": "16",
        "--enable-lora": None,
        "--disable-uvicorn-access-log": None,
        "--enforce-eager": None,
        "--worker-cls": "serve.cpu_lora.GroupedLoraWorker",
        "--distributed-executor-backend": "vllm.v1.executor.uniproc_executor.UniProcExecutor",
    }


def test_what_a_request_leaves_open_is_the_operators(tmp_path):
    told = pairs(engine_arguments(ModelConfig(), ServeConfig(temperature=0.0, max_answer_tokens=5), tmp_path, "base", None))
    assert json.loads(told["--override-generation-config"]) == {"temperature": 0.0, "max_new_tokens": 5}


@pytest.mark.parametrize(("share", "memory"), [(1.0, "0.900"), (0.5, "0.450")])
def test_an_engine_on_a_gpu_takes_its_share_of_the_memory(share, memory, tmp_path):
    options = pairs(engine_arguments(ModelConfig(), SERVE, tmp_path, "base", share))
    assert (options["--gpu-memory-utilization"], options["--quantization"], options["--dtype"]) == (memory, "fp8", "auto")
    assert "--enforce-eager" not in options
    assert "--distributed-executor-backend" not in options
    assert options["--worker-cls"] == "serve.gpu_lora.BesideLoraWorker"
    assert "--cudagraph-capture-sizes" in options
    assert "--specialize-active-lora" not in options, (
        "vLLM counts without those that have no adapter, and leaves one out where some have none"
    )
    options = pairs(engine_arguments(ModelConfig(), ServeConfig(enforce_eager=True), tmp_path, "base", share))
    assert "--enforce-eager" in options
    assert "--cudagraph-capture-sizes" not in options
    assert "--quantization" not in options


@pytest.mark.parametrize(("at_once", "most"), [(1, 2), (8, 16), (100, 200), (256, 512), (1000, 512)])
def test_graphs_are_for_as_many_tokens_as_twice_the_answers_at_once(at_once, most):
    sizes = graph_sizes(at_once)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert set(sizes) <= {*GRAPH_SIZES, most}


def test_an_engine_has_a_thread_for_each_core_that_its_process_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr("cluster.limits.GROUP", tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(7)))
    take_threads()
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_the_environment_of_an_engine_binds_threads_and_memory_on_the_cpu_alone():
    on_cpu = engine_environment(ServeConfig(kv_cache_gib=3), on_gpu=False)
    on_gpu = engine_environment(ServeConfig(), on_gpu=True)
    assert (on_cpu["VLLM_CPU_KVCACHE_SPACE"], on_cpu["VLLM_CPU_OMP_THREADS_BIND"]) == ("3", "nobind")
    assert "OMP_NUM_THREADS" not in on_cpu, "the head does not know the cores of an engine's card"
    assert not [name for name in on_gpu if "CPU" in name or "BIND" in name]
    assert on_gpu.items() - BESIDE.items() <= on_cpu.items()
    assert BESIDE.items() <= on_gpu.items()
    assert all(isinstance(value, str) for value in on_cpu.values())
