"""The client of HTTP reward services: what it sends, what it accepts, how it waits. Faults are in tests/faults."""

import asyncio
import json
import logging
import random
import signal
import threading
from itertools import pairwise

import httpx2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rto_lightning.backbone import load_chat_tokenizer
from rto_lightning.errors import Stopped, UserError
from rto_lightning.rewards import RewardServiceSettings, WeightedReward
from rto_lightning.rewards.remote import service_urls
from rto_lightning.rewards.remote.client import _seconds
from rto_lightning.rewards.remote.pool import ServicePool, Unavailable
from rto_lightning.rewards.remote.protocol import WrongAnswer, read_answer, request_content
from tests.models import backbone_settings
from tests.modules import stages
from tests.rewards.services import Clock, FaultyServer, free_port, late, remote, responses, running, say

TEXTS = ["Good day!", "No.", "cut off in the mid", "", "Yes, surely."]
LENGTHS = [9.0, 3.0, 18.0, 0.0, 12.0]


@pytest.fixture(scope="module")
def chat(tiny_model):
    return load_chat_tokenizer(backbone_settings(tiny_model))


# What is sent


def test_the_request_has_what_openrlhf_sends_and_what_makes_it_exact(chat):
    prompts, trajectory = responses(chat, ["Hello!", "cut"])
    start = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert request_content(prompts, trajectory, chat) == {
        "query": [start.format("") + "Hello!<|im_end|>", start.format("Hi") + "cut"],
        "prompts": [start.format(""), start.format("Hi")],
        "labels": ["", ""],
        "messages": prompts,
        "responses": ["Hello!", "cut"],
        "truncated": [False, True],
        "vocabulary": chat.fingerprint,
        "prompt_ids": chat.encode_prompts(prompts),
        "response_ids": [chat.encode_response("Hello!", 99), chat.encode_response("cut", 99)[:-1]],
    }


def test_scores_keep_the_order_of_responses_whatever_the_order_of_answers(chat):
    prompts, trajectory = responses(chat, TEXTS * 2)
    delays = [late(0.2), late(0.1), late(0.05), late(0.15)]
    with running(FaultyServer(*delays)) as server:
        source = remote(chat, server, batch_size=2, concurrency=4)
        scores = source.score(prompts, trajectory)
    assert scores.dtype == torch.float32 and scores.tolist() == LENGTHS * 2
    assert sorted(len(request["query"]) for request in server.requests) == [2] * 5


def test_as_many_requests_wait_as_are_allowed(chat):
    prompts, trajectory = responses(chat, TEXTS * 3)
    waiting, most, together = [], [], threading.Barrier(3, timeout=60)

    def answer_three_together(handler):
        waiting.append(handler)
        most.append(len(waiting))
        together.wait()
        waiting.remove(handler)
        handler.answer(json.dumps({"rewards": handler.scores}))

    with running(FaultyServer(fault=answer_three_together)) as server:
        remote(chat, server, batch_size=1, concurrency=3).score(prompts, trajectory)
    assert max(most) == 3 and len(most) == 15


def test_requests_are_spread_over_services(chat):
    prompts, trajectory = responses(chat, TEXTS * 2)
    with running(FaultyServer()) as one, running(FaultyServer()) as other:
        source = remote(chat, one, other, batch_size=1)
        assert source.score(prompts, trajectory).tolist() == LENGTHS * 2
    assert min(len(one.requests), len(other.requests)) >= 4  # of the eight that are made at once
    assert source.name == f"the reward service {one.url}, {other.url}"


# What is accepted


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=5), st.booleans())
def test_finite_numbers_come_through_exactly(scores, nested):
    sent = [[score] for score in scores] if nested else scores
    assert read_answer(json.dumps({"rewards": sent}).encode(), len(scores)) == scores
    assert read_answer(json.dumps({"scores": sent, "extra_logs": {}}).encode(), len(scores)) == scores


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "no JSON (nothing at all)"),
        ("<html>Bad\n gateway</html>", "no JSON ('<html>Bad gateway</html>')"),
        ('{"rewards": [1.0,', "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("9" * 5000, "no JSON"),
        ("[1.0, 2.0]", "no list `rewards`"),
        ('{"reward": [1.0, 2.0]}', "no list `rewards`"),
        ('{"rewards": null}', "no list `rewards`"),
        ('{"rewards": [1.0]}', "1 scores for 2 responses"),
        ('{"rewards": [1.0, "2.0"]}', "'2.0', which is no number, for response 1"),
        ('{"rewards": [null, 2.0]}', "'None', which is no number, for response 0"),
        ('{"rewards": [true, 2.0]}', "'True', which is no number"),
        ('{"rewards": [[1.0, 2.0], 2.0]}', "which is no number"),
        ('{"rewards": [NaN, 2.0]}', "nan, which is not finite, for response 0"),
        ('{"rewards": [1.0, -Infinity]}', "-inf, which is not finite, for response 1"),
        ('{"rewards": [1.0, 1e39]}', "1e+39, which is not finite"),
        ('{"rewards": [1.0, 1%s]}' % ("0" * 400), "which is not finite"),
    ],
)
def test_anything_else_is_a_wrong_answer(body, message):
    with pytest.raises(WrongAnswer) as error:
        read_answer(body.encode(), 2)
    assert message in str(error.value)


# How it waits


def failing_pool(clock, seconds, **options):
    """A pool whose only service fails for so long; returns the times at which it was asked."""
    pool = ServicePool([httpx2.URL("http://a/x")], clock.now, clock.sleep)
    times = []

    async def ask():
        while clock.now() < seconds:
            service = await pool.choose(seconds + 100)
            times.append(clock.now())
            pool.note_failure(service, clock.now(), Unavailable("refused", **options))
        pool.note_answer(await pool.choose(seconds + 100))

    asyncio.run(ask())
    return times


def test_delays_grow_and_are_bounded_and_repeatable():
    times = failing_pool(Clock(), 600)
    delays = [after - before for before, after in pairwise(times)]
    bounds = [min(2.0**number, 30.0) for number in range(len(delays))]
    assert all(0.5 * bound <= delay <= bound for delay, bound in zip(delays, bounds, strict=True))
    assert times == failing_pool(Clock(), 600)


def test_waiting_draws_nothing_from_the_generators_of_a_run():
    states = random.getstate(), torch.get_rng_state()
    failing_pool(Clock(), 600)
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_an_outage_is_told_a_few_times_and_so_is_its_end(caplog):
    with caplog.at_level(logging.INFO, logger="rto_lightning"):
        failing_pool(Clock(), 600)
    assert caplog.messages[0] == "the reward service http://a/x gives no scores (refused); it is asked again."
    assert 10 <= len(caplog.messages) <= 22
    assert caplog.messages[-1].startswith("the reward service http://a/x gives scores again, after 6")


def test_failures_at_the_same_time_count_once():
    clock = Clock()
    pool = ServicePool([httpx2.URL("http://a")], clock.now, clock.sleep)
    for _ in range(20):
        pool.note_failure(pool.services[0], clock.now(), Unavailable("refused"))
    assert pool.services[0].ready_at <= 1.0


def test_a_service_is_left_alone_as_long_as_it_asks():
    assert failing_pool(Clock(), 300, retry_after=100.0) == [0.0, 100.0, 200.0, 300.0]


def test_retry_after_is_seconds_or_a_date():
    assert _seconds("17") == 17.0
    assert 3e8 < _seconds("Fri, 31 Dec 2049 23:59:59 GMT") < 3e9
    assert [_seconds(text) for text in ("", "soon", "-5", "Fri, 31 Dec 1999 23:59:59 GMT", "9" * 400)] == [0.0] * 5


def test_a_notebook_which_has_a_running_event_loop_can_score(chat):
    prompts, trajectory = responses(chat, TEXTS)
    with running(FaultyServer()) as server:

        async def cell():
            return remote(chat, server).score(prompts, trajectory)

        assert asyncio.run(cell()).tolist() == LENGTHS


def test_a_signal_ends_the_wait_at_once(chat):
    prompts, trajectory = responses(chat, TEXTS)
    asked, release = threading.Event(), threading.Event()

    def hang(handler):
        asked.set()
        release.wait(60)

    def interrupt():
        asked.wait(60)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGALRM)

    def stop(number, frame):
        raise Stopped(number)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with running(FaultyServer(fault=hang)) as server:
            threading.Thread(target=interrupt).start()
            with pytest.raises(Stopped):
                remote(chat, server, answer_timeout=60.0).score(prompts, trajectory)
            assert not release.is_set()
            release.set()
    finally:
        signal.signal(signal.SIGALRM, before)


# Tokens and addresses


def test_the_token_is_sent_and_never_told(chat, monkeypatch):
    prompts, trajectory = responses(chat, TEXTS)
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-token\n")
    echo = say('{"error": "s3cret-token is expired"}', 401)
    with running(FaultyServer(None, echo)) as server:
        source = remote(chat, server, token_variable="REWARD_TOKEN")
        assert source.score(prompts, trajectory).tolist() == LENGTHS
        with pytest.raises(UserError, match="token_variable") as error:
            source.score(prompts, trajectory)
    assert server.headers[0]["Authorization"] == "Bearer s3cret-token"
    assert "s3cret" not in str(error.value) and "401" in str(error.value)
    assert "s3cret" not in repr(source.settings)


def test_without_a_token_none_is_sent(chat):
    prompts, trajectory = responses(chat, TEXTS)
    with running(FaultyServer()) as server:
        remote(chat, server).score(prompts, trajectory)
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("value", "message"), [(None, "REWARD_TOKEN, which is not set"), (" ", "not set"), ("s3cret-ü", "printable ASCII")]
)
def test_a_token_that_cannot_be_sent_is_refused(chat, monkeypatch, value, message):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(UserError, match=message) as error:
        remote(chat, "http://a/x", token_variable="REWARD_TOKEN")
    assert "s3cret" not in str(error.value)


def test_a_token_in_the_place_of_a_variable_is_refused_and_not_repeated():
    with pytest.raises(UserError, match="no name of an environment variable") as error:
        RewardServiceSettings(token_variable="hf_abc-123")
    assert "abc" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://me:s3cret@host/x", r"http://host/x holds a user name or password"),
        ("host:5000/get_reward", "no HTTP address"),
        ("s3cret:s3cret@host/x", "no HTTP address"),
        ("ftp://host/x", "no HTTP address"),
        ("http://", "no HTTP address"),
        ("http://host:s3cret/x", "no HTTP address"),
        ([], "empty list"),
    ],
)
def test_what_is_no_address_or_holds_a_password_is_refused(url, message):
    with pytest.raises(UserError, match=message) as error:
        WeightedReward(reward_url=url)
    assert "s3cret" not in str(error.value)


def test_keys_in_an_address_are_sent_and_not_shown(chat):
    assert str(service_urls("https://host/x?api_key=s3cret")[0]) == "https://host/x?api_key=s3cret"
    assert remote(chat, "https://host/x?api_key=s3cret").name == "the reward service https://host/x"


@pytest.mark.parametrize("name", ["batch_size", "concurrency", "connect_timeout", "answer_timeout"])
def test_settings_that_no_run_can_use_are_refused(name):
    with pytest.raises(UserError, match=f"model.reward_service.{name} is 0"):
        RewardServiceSettings(**{name: 0})


# In a run


def test_a_service_is_one_source_among_others(tiny_model):
    url = f"http://127.0.0.1:{free_port()}/get_reward"
    module = stages.rto(tiny_model, reward_function=None, reward_url=url)
    assert [source.reward_url for source in module.sources] == [url]
    with pytest.raises(UserError, match=r"model.reward_function and model.reward_url are both set"):
        stages.rto(tiny_model, reward_url=url)
    with pytest.raises(UserError, match=r"critic.init is reward, but model.reward is no saved reward role"):
        stages.rto(tiny_model, reward_function=None, reward_url=url, critic=stages.CriticSettings())
