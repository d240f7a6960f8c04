"""Reward services that fail, on real sockets: a run gets the right scores all the same, or says what is wrong.

Waiting is done by a clock that waits in no time; only time-outs of a few tenths of a second are real.
"""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rto_lightning.backbone import load_chat_tokenizer
from rto_lightning.cli import main
from rto_lightning.errors import UserError
from tests.models import backbone_settings
from tests.rewards.services import (
    Clock,
    FaultyServer,
    free_port,
    late,
    remote,
    responses,
    running,
    say,
    serving,
)
from tests.roles import save_random_role

pytestmark = pytest.mark.slow
AREA = "remote reward"

TEXTS = [f"answer {'!' * n}" for n in range(6)]
LENGTHS = [float(len(text)) for text in TEXTS]
PATIENCE = 600.0


@pytest.fixture(scope="module")
def chat(tiny_model):
    return load_chat_tokenizer(backbone_settings(tiny_model))


@pytest.fixture
def clock():
    return Clock()


def hang(handler):
    """No answer within the time-out of these tests."""
    time.sleep(1.0)


def drip(handler):
    """An answer that comes in time byte by byte, but not to its end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        time.sleep(0.03)


def end(handler):
    """The connection ends in the place of an answer."""


def reset(handler):
    handler.reset()


def reset_in_the_middle(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "100")
    handler.end_headers()
    handler.wfile.write(b'{"rewards": [1.0,')
    handler.wfile.flush()
    handler.reset()


def babble(handler):
    handler.wfile.write(b"\x00\xffwhat is this\r\n\r\n")


UNAVAILABLE = {
    "no answer": hang,
    "an answer that drips": drip,
    "connection ended": end,
    "connection reset": reset,
    "reset in the middle of an answer": reset_in_the_middle,
    "answer shorter than announced": say('{"rewards": [1.0', length=500),
    "no HTTP": babble,
    "500": say("Internal Server Error", 500),
    "502 with a page": say("<html>Bad gateway</html>", 502),
    "503": say("", 503),
    "504": say("", 504),
    "408": say("", 408),
    "429": say('{"error": "slow down"}', 429),
}

WRONG = {
    "empty body": (say(""), "no JSON (nothing at all)"),
    "truncated JSON": (say('{"rewards": [1.0,'), "no JSON"),
    "a page": (say("<html>Welcome</html>"), "no JSON ('<html>Welcome</html>')"),
    "compressed": (say(b"\x1f\x8b\x08\x00", Content_Encoding="gzip"), "no JSON"),
    "no rewards": (say('{"error": "model not loaded"}'), 'no list `rewards` (\'{"error": "model not loaded"}\')'),
    "null": (say('{"rewards": null}'), "no list `rewards`"),
    "too few": (say('{"rewards": [1.0]}'), "1 scores for 3 responses"),
    "too many": (say('{"rewards": [1, 2, 3, 4]}'), "4 scores for 3 responses"),
    "NaN": (say('{"rewards": [1.0, NaN, 2.0]}'), "nan, which is not finite, for response 1"),
    "Infinity": (say('{"rewards": [1.0, 2.0, Infinity]}'), "inf, which is not finite, for response 2"),
    "beyond float32": (say('{"rewards": [1e300, 2.0, 3.0]}'), "1e+300, which is not finite, for response 0"),
    "strings": (say('{"rewards": ["1.0", "2.0", "3.0"]}'), "'1.0', which is no number, for response 0"),
    "a null among numbers": (say('{"rewards": [1.0, null, 3.0]}'), "'None', which is no number, for response 1"),
    "huge": (say(b" " * (17 * 2**20)), "more than 16777216 bytes"),
}

REFUSED = {
    "400": (say('{"error": "no `query`"}', 400), "no `query`"),
    "401": (say("", 401), "token_variable"),
    "403": (say("", 403), "token_variable"),
    "404": (say("", 404), "the path too, such as /get_reward"),
    "413": (say("", 413), "batch_size"),
    "501": (say("", 501), "its log may say why"),
}


@pytest.mark.parametrize("fault", UNAVAILABLE)
def test_what_fails_for_a_while_is_asked_again(faults, chat, clock, fault):
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, fault), running(FaultyServer(*[UNAVAILABLE[fault]] * 4)) as server:
        source = remote(chat, server, clock=clock, batch_size=3, answer_timeout=0.3)
        assert source.score(prompts, trajectory).tolist() == LENGTHS
        assert len(server.requests) == 6 and 0 < clock.now() < 60


@pytest.mark.parametrize("fault", UNAVAILABLE)
def test_what_fails_for_longer_than_patience_ends_the_run(faults, chat, clock, fault):
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, f"{fault}, for ever"), running(FaultyServer(fault=UNAVAILABLE[fault])) as server:
        source = remote(chat, server, clock=clock, batch_size=6, answer_timeout=0.1, patience=20.0)
        with pytest.raises(UserError, match=r"for longer than reward_service\.patience, 20 seconds") as error:
            source.score(prompts, trajectory)
        assert f"{server.url} gives no scores of responses 0 to 5 (" in str(error.value)
        assert 5 < clock.now() <= 20.0


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_is_asked_for_again_once(faults, chat, clock, fault):
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, fault), running(FaultyServer(WRONG[fault][0])) as server:
        assert remote(chat, server, clock=clock, batch_size=3).score(prompts, trajectory).tolist() == LENGTHS
        assert len(server.requests) == 3 and clock.now() == 0


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_answer_that_stays_wrong_is_a_clear_error(faults, chat, clock, fault):
    answer, message = WRONG[fault]
    prompts, trajectory = responses(chat, TEXTS[:3])
    with faults.tried(AREA, f"{fault}, twice"), running(FaultyServer(fault=answer)) as server:
        with pytest.raises(UserError) as error:
            remote(chat, server, clock=clock).score(prompts, trajectory)
        assert f"the reward service {server.url} sent " in str(error.value)
        assert message in str(error.value) and "responses 0 to 2" in str(error.value)
        assert len(server.requests) == 2


@pytest.mark.parametrize("fault", REFUSED)
def test_a_refusal_is_told_at_once(faults, chat, clock, fault):
    answer, message = REFUSED[fault]
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, fault), running(FaultyServer(fault=answer)) as server:
        with pytest.raises(UserError) as error:
            remote(chat, server, clock=clock).score(prompts, trajectory)
        assert f"the reward service {server.url} refused a request ({fault}" in str(error.value)
        assert message in str(error.value)
        assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_takes_no_token_along(faults, chat, clock, monkeypatch, status):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    prompts, trajectory = responses(chat, TEXTS)
    with (
        faults.tried(AREA, f"redirect {status}"),
        running(FaultyServer()) as other,
        running(FaultyServer(fault=say("", status, Location=other.url))) as server,
    ):
        with pytest.raises(UserError, match="the address that it redirects to"):
            remote(chat, server, clock=clock, token_variable="REWARD_TOKEN").score(prompts, trajectory)
        assert other.requests == []


@pytest.mark.parametrize("status", [429, 503])
def test_a_service_is_left_alone_as_long_as_it_asks(faults, chat, clock, status):
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, f"{status} with Retry-After"):
        with running(FaultyServer(say("", status, Retry_After="120"))) as server:
            assert remote(chat, server, clock=clock).score(prompts, trajectory).tolist() == LENGTHS
            assert clock.now() == 120
        with running(FaultyServer(say("", status, Retry_After="99999"))) as server:
            with pytest.raises(UserError, match="patience"):
                remote(chat, server, clock=clock).score(prompts, trajectory)
            assert len(server.requests) == 1 and clock.now() == 120


# Outages


def test_a_service_that_starts_minutes_late_is_waited_for(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS)
    port = free_port()
    started = []
    clock.events.append((550.0, lambda: started.append(start(port))))
    with faults.tried(AREA, "refused for nine minutes"):
        source = remote(chat, f"http://127.0.0.1:{port}/get_reward", clock=clock, batch_size=1)
        try:
            assert source.score(prompts, trajectory).tolist() == LENGTHS
        finally:
            for context in started:
                context.__exit__(None, None, None)
        assert 550 <= clock.now() <= PATIENCE


def start(port):
    """A server that answers from now on."""
    context = running(FaultyServer(port=port))
    context.__enter__()
    return context


def test_a_service_that_dies_and_comes_back_again_and_again(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS)
    port = free_port()
    url = f"http://127.0.0.1:{port}/get_reward"
    with faults.tried(AREA, "dies and comes back"):
        source = remote(chat, url, clock=clock, batch_size=2)
        for outage in range(3):
            with running(FaultyServer(port=port)):
                assert source.score(prompts, trajectory).tolist() == LENGTHS
            back = []
            clock.events.append((clock.now() + 100.0 * (outage + 1), lambda back=back: back.append(start(port))))
            assert source.score(prompts, trajectory).tolist() == LENGTHS
            back[0].__exit__(None, None, None)
        assert clock.now() >= 600


def test_a_service_that_never_comes_is_given_up(faults, chat, clock, caplog):
    prompts, trajectory = responses(chat, TEXTS)
    url = f"http://127.0.0.1:{free_port()}/get_reward"
    with faults.tried(AREA, "refused for ever"):
        with pytest.raises(UserError, match=r"(?s)Connect call failed.*start it again") as error:
            remote(chat, url, clock=clock, batch_size=2).score(prompts, trajectory)
        assert url in str(error.value)
        assert PATIENCE - 31 < clock.now() <= PATIENCE
        assert 10 <= len(caplog.messages) <= 21


def test_a_name_that_is_not_known_is_named(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS)
    with faults.tried(AREA, "unknown host"), pytest.raises(UserError, match="no-such-host"):
        remote(chat, "http://no-such-host.invalid:5000/x", clock=clock, patience=5.0).score(prompts, trajectory)


@pytest.mark.parametrize("fault", ["refused", *UNAVAILABLE])
def test_one_of_two_services_is_dead(faults, chat, clock, fault):
    prompts, trajectory = responses(chat, TEXTS * 5)
    dead = FaultyServer(fault=UNAVAILABLE.get(fault))
    url = dead.url if fault != "refused" else f"http://127.0.0.1:{free_port()}/get_reward"
    with faults.tried(AREA, f"one of two: {fault}"), running(dead), running(FaultyServer()) as alive:
        source = remote(chat, url, alive, clock=clock, batch_size=1, concurrency=2, answer_timeout=0.3)
        assert source.score(prompts, trajectory).tolist() == LENGTHS * 5
        assert len(dead.requests) <= 2 and len(alive.requests) == 30 and clock.now() == 0


def test_two_services_fail_in_turn(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS * 5)
    broken = say("", 500)
    with (
        faults.tried(AREA, "two services fail in turn"),
        running(FaultyServer(*[broken, None] * 9)) as one,
        running(FaultyServer(*[None, broken] * 9)) as other,
    ):
        source = remote(chat, one, other, clock=clock, batch_size=1)
        assert source.score(prompts, trajectory).tolist() == LENGTHS * 5


def test_answers_come_out_of_order(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS)
    delays = [late(0.3 - 0.05 * n) for n in range(6)]
    with faults.tried(AREA, "answers out of order"), running(FaultyServer(*delays)) as server:
        assert remote(chat, server, clock=clock, batch_size=1).score(prompts, trajectory).tolist() == LENGTHS


def test_an_error_of_one_request_ends_the_others(faults, chat, clock):
    prompts, trajectory = responses(chat, TEXTS)
    server = FaultyServer(hang, hang, say("", 400), hang, hang, hang)
    with (
        faults.tried(AREA, "one request is refused while others hang"),
        running(server),
        pytest.raises(UserError, match="refused a request"),
    ):
        remote(chat, server, clock=clock, batch_size=1).score(prompts, trajectory)


# Whole runs


def write_run(folder: Path, model: Path, name: str, **sources: object) -> str:
    """The configuration of an RTO run whose score is all of its reward."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(12)))
    settings = {
        "backbone": {"model": str(model), "lora": {"rank": 4, "alpha": 8}},
        "rollout": {"max_new_tokens": 6},
        "rewards": {"beta_1": 0.0, "normalization_samples": 8},
        "ppo": {"microbatch_size": 2},
        "critic": {"init": "policy"},
        "policy_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
        "critic_optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1.0e-2}},
        **sources,
    }
    config = {
        "model": {"class_path": "rto_lightning.modules.RTOModule", "init_args": settings},
        "data": {
            "class_path": "rto_lightning.data.PromptDataModule",
            "init_args": {"train": str(prompts), "max_prompt_tokens": 60, "batch_size": 4},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 3,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(folder / name),
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def policy_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "role" / "adapter_model.safetensors")


def test_a_run_that_asks_a_served_role_trains_what_a_run_with_the_role_does(faults, tiny_model, tmp_path):
    role = save_random_role(tiny_model, tmp_path / "reward", "reward")
    # The critic starts as the role too: a fresh adapter would be drawn after whatever the run has loaded before.
    raw = {"rewards": {"beta_1": 0.0, "normalize_score": False}, "critic": {"init": role}}
    with faults.tried(AREA, "a whole run against serve-reward"):
        assert main(["fit", "--config", write_run(tmp_path, tiny_model, "with_role", reward=role, **raw)]) == 0
        with serving(role) as (_, url):
            config = write_run(tmp_path, tiny_model, "with_service", reward_url=url, **raw)
            assert main(["fit", "--config", config, "--model.reward_service.batch_size", "3"]) == 0
        expected, found = policy_of(tmp_path, "with_role"), policy_of(tmp_path, "with_service")
        assert expected.keys() == found.keys()
        for name, weight in expected.items():
            # Other batches round otherwise, by 6e-7; three steps at this learning rate move a weight by up to 0.03.
            torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5, msg=name)


def test_a_run_goes_through_faults_as_if_there_were_none(faults, tiny_model, tmp_path):
    trouble = [say("", 503), reset, say("<html>"), None, end, say('{"rewards": [NaN]}'), None, say("", 500), late(0.1)]
    with faults.tried(AREA, "a whole run through faults"):
        for name, given in (("calm", []), ("troubled", trouble)):
            with running(FaultyServer(*given)) as server:
                config = write_run(tmp_path, tiny_model, name, reward_url=[server.url])
                assert main(["fit", "--config", config, "--model.reward_service.concurrency", "1"]) == 0
        expected, found = policy_of(tmp_path, "calm"), policy_of(tmp_path, "troubled")
        assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_run_that_a_service_refuses_ends_with_one_line(faults, tiny_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with faults.tried(AREA, "a whole run refused"), running(FaultyServer(fault=say("s3cret?", 401))) as server:
        service = {"token_variable": "REWARD_TOKEN"}
        config = write_run(tmp_path, tiny_model, "refused", reward_url=server.url, reward_service=service)
        assert main(["fit", "--config", config]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith(f"rto-lightning: error: the reward service {server.url} refused a request (401")
        written = [path for path in (tmp_path / "refused").rglob("*") if path.is_file()]
        assert written and not any(b"s3cret" in path.read_bytes() for path in [*written, tmp_path / "refused.yaml"])
        assert "s3cret" not in last
