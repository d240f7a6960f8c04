"""`rto-lightning serve-reward`: which role it finds, whom it lets in, how it ends."""

import signal
import socket

import httpx2
import pytest
import torch

from rto_lightning.cli import main
from rto_lightning.rewards import WeightedReward, make_reward_source
from tests.models import make_backbone
from tests.rewards.services import remote, responses, serving
from tests.roles import save_random_role


@pytest.fixture(scope="module")
def role(tiny_model, tmp_path_factory):
    """The folder of a stage, with its role."""
    stage = tmp_path_factory.mktemp("served") / "reward_model"
    save_random_role(tiny_model, stage / "role", "reward")
    return stage / "role"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_is_served_until_a_signal_comes(tiny_model, role, number):
    source = make_reward_source(make_backbone(tiny_model, dtype="float32"), WeightedReward(str(role)))
    prompts, trajectory = responses(source.backbone.chat, ["Good day!", "No.", "cut off"])
    with serving(str(role.parent), "--batch_size", "2") as (process, url):
        scores = remote(source.backbone.chat, url).score(prompts, trajectory)
        torch.testing.assert_close(scores, source.score(prompts, trajectory).detach(), rtol=0, atol=1e-5)
        process.send_signal(number)
        assert process.wait(60) == 0


@pytest.mark.slow
def test_open_to_the_network_it_says_so_and_asks_for_the_token(role):
    options = ("--host", "0.0.0.0", "--token_variable", "REWARD_TOKEN", "--max_rows", "1")
    with serving(str(role), *options, REWARD_TOKEN="s3cret") as (process, url):
        assert "open to the network: whoever has the token" in process.stdout.readline()
        url = url.replace("0.0.0.0", "127.0.0.1")
        body = {"query": ["a"]}
        assert httpx2.post(url, json=body, trust_env=False).status_code == 401
        authorized = {"Authorization": "Bearer s3cret"}
        assert httpx2.post(url, json=body, headers=authorized, trust_env=False).status_code == 200
        assert httpx2.post(url, json={"query": ["a", "b"]}, headers=authorized, trust_env=False).status_code == 400


@pytest.fixture
def fails(capsys):
    """Runs the command and returns its only line on stderr, and its status."""

    def run(*args):
        status = main(["serve-reward", *map(str, args)])
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err.removeprefix("rto-lightning: error: ").strip(), status

    return run


def test_a_network_needs_a_token_or_an_explicit_no(fails, role):
    message, status = fails(role, "--host", "0.0.0.0")
    assert status == 2 and "--token_variable, or let everyone in by --no_token" in message


def test_a_token_that_is_not_there_is_named(fails, role, monkeypatch):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    message, status = fails(role, "--token_variable", "REWARD_TOKEN")
    assert status == 1 and "REWARD_TOKEN, which is not set" in message
    message, status = fails(role, "--token_variable", "hf_abc-123")
    assert status == 1 and "no name of an environment variable" in message and "abc" not in message


def test_only_reward_roles_are_served(fails, tiny_model, tmp_path):
    folder = save_random_role(tiny_model, tmp_path / "dpo", "dpo")
    assert "is the role dpo, not reward" in fails(folder)[0]
    assert "does not exist" in fails(tmp_path / "nowhere")[0]
    assert "many is no whole number above 0" in fails(folder, "--batch_size", "many")[0]
    assert "0 is no whole number above 0" in fails(folder, "--max_rows", "0")[0]


def test_a_port_that_is_taken_is_named(fails, role):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        message, status = fails(role, "--port", port)
    assert status == 1 and f"127.0.0.1, port {port}" in message
    assert "port 70000" in fails(role, "--port", 70_000)[0]
    assert "host-that-is-not-there" in fails(role, "--host", "host-that-is-not-there", "--no_token")[0]


def test_a_device_that_is_not_there_is_named(fails, role):
    assert "the device cuda:99 cannot be used" in fails(role, "--device", "cuda:99")[0]
