"""The client of a vLLM server, and the process in which one is started, with a small server in vLLM's place."""

import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import httpx2
import pytest

from rto_lightning.errors import UserError
from rto_lightning.rollout import RolloutSettings, VLLMSettings
from rto_lightning.rollout.vllm import EngineStopped, process
from rto_lightning.rollout.vllm.process import ServerProcess, flags
from rto_lightning.rollout.vllm.server import ServerClient
from tests.models import make_backbone
from tests.rollout.fake_server import FakeServer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server():
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def backbone(tiny_model):
    return make_backbone(tiny_model, dtype="float32")


def _client(backbone, **vllm):
    settings = RolloutSettings(max_new_tokens=9, temperature=0.7, vllm=VLLMSettings(mode="server", **vllm))
    return ServerClient(backbone, settings)


@pytest.fixture
def client(backbone, server):
    client = _client(backbone, urls=[server.address], start_timeout=5.0)
    client.start()
    yield client
    client.close()


def test_each_prompt_is_asked_with_its_seed_and_what_makes_it_a_sample_of_the_policy(client, server, backbone):
    samples = client.sample([[5, 6], [7]], [2**62, 11], "policy-1")
    assert samples == [([6, 5, 2**62], [-6.0, -5.0, -float(2**62)]), ([7, 11], [-7.0, -11.0])]
    bodies = sorted((body for path, body in server.requests), key=lambda body: body["seed"])
    assert [body.pop("prompt") for body in bodies] == [[7], [5, 6]]
    assert [body.pop("seed") for body in bodies] == [11, 2**62]
    assert bodies[0] == bodies[1]
    assert bodies[0] == {
        "model": "policy-1",
        "temperature": 0.7,
        "max_tokens": 9,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "stop_token_ids": list(backbone.chat.stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "return_token_ids": True,
    }


def test_without_an_adapter_the_served_model_answers(client, server):
    client.sample([[5]], [0], None)
    assert server.requests[-1][1]["model"] == "base"
    assert client.max_model_len == 64


def test_weights_are_announced_and_the_cache_is_dropped(client, server):
    client.add_adapter("policy-1", Path("/weights/a"))
    client.remove_adapter("policy-1")
    client.load_weights(Path("/weights/b"))
    assert server.requests == [
        ("/v1/load_lora_adapter", {"lora_name": "policy-1", "lora_path": "/weights/a"}),
        ("/v1/unload_lora_adapter", {"lora_name": "policy-1"}),
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": "/weights/b"}}),
        ("/reset_prefix_cache", None),
    ]


def test_an_error_of_the_server_counts_as_a_crash(client, server):
    server.status = 500
    with pytest.raises(EngineStopped, match="out of memory"):
        client.sample([[5], [6]], [0, 1], None)


def test_a_refusal_does_not(client, server):
    server.status = 404
    with pytest.raises(UserError, match=r"refused /v1/load_lora_adapter \(404"):
        client.add_adapter("policy-1", Path("/weights/a"))


def test_nobody_there_counts_as_a_crash(client, server):
    server.shutdown()
    server.server_close()
    client.close()
    with pytest.raises(UserError, match=r"was not ready within 0.1 seconds; raise model.rollout.vllm.start_timeout"):
        _client(client.backbone, urls=[server.address], start_timeout=0.1).start()
    with pytest.raises(EngineStopped):
        client.connect(server.address)


# Processes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_vllm(tmp_path, monkeypatch):
    """A package `vllm` whose server is the fake one, for processes that are started."""
    package = tmp_path / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text("from tests.rollout.fake_server import main\n\nmain()\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    monkeypatch.setenv("RANK", "3")


def test_a_server_is_started_asked_and_ended(fake_vllm, backbone):
    client = _client(backbone, start_timeout=20.0)
    address = client.start()
    assert client.sample([[5]], [3], None) == [([5, 3], [-5.0, -3.0])]
    second = _client(backbone)
    second.connect(address)
    assert second.max_model_len == 64 and second.place == client.place
    second.close()
    process = client._process
    environment = Path(f"/proc/{process.process.pid}/environ").read_text().split("\0")
    assert not any(entry.startswith("RANK=") for entry in environment)
    assert "VLLM_SERVER_DEV_MODE=1" in environment
    client.close()
    assert process.ended()
    with pytest.raises(httpx2.TransportError):
        httpx2.get(f"{address}/health", trust_env=False)
    client.close()


def test_a_killed_server_counts_as_a_crash(fake_vllm, backbone):
    client = _client(backbone, start_timeout=20.0)
    client.start()
    client._process.process.kill()
    client._process.process.wait()
    with pytest.raises(EngineStopped, match="--model"):  # all that its log holds is the command
        client.sample([[5]], [3], None)
    client.close()


def test_what_a_server_said_before_it_ended_is_told(fake_vllm, backbone, monkeypatch):
    monkeypatch.setattr(backbone, "settings", replace(backbone.settings, model="broken"))
    client = _client(backbone, start_timeout=20.0)
    with pytest.raises(UserError, match=r"vLLM did not start: ValueError: Head size 7 is not supported. bye;"):
        client.start()
    client.close()


def test_a_server_ends_when_the_run_is_killed(fake_vllm, tmp_path):
    """The end of a process closes what it holds; here the server's standard input is all that is closed."""
    server = ServerProcess("model", {}, None, None, tmp_path / "log")
    assert not server.ended()
    server.process.stdin.close()
    assert server.process.wait(timeout=20) == -signal.SIGKILL


def test_an_unused_server_ends_with_the_object_that_started_it(fake_vllm, tmp_path):
    server = ServerProcess("model", {}, None, None, tmp_path / "log")
    child = server.process
    assert child.poll() is None
    del server
    assert child.poll() is not None


def test_a_server_gets_the_devices_that_are_named(fake_vllm, tmp_path):
    server = ServerProcess("model", {}, None, "4,5", tmp_path / "log")
    assert "CUDA_VISIBLE_DEVICES=4,5" in Path(f"/proc/{server.process.pid}/environ").read_text().split("\0")
    assert server.address.startswith(f"http://{process.HOST}:")
    server.close()


def test_arguments_become_flags():
    arguments = {"max_loras": 1, "enforce_eager": True, "enable_prefix_caching": False, "hf_overrides": {"a": 1}}
    assert flags(arguments) == [
        "--max-loras=1",
        "--enforce-eager",
        "--no-enable-prefix-caching",
        '--hf-overrides={"a": 1}',
    ]
