"""A reward role behind a service: its scores, its limits, and clients of both kinds."""

import http.client
import json
import socket
import threading

import httpx2
import pytest
import torch

from rto_lightning.backbone import Sequences
from rto_lightning.rewards import WeightedReward, make_reward_source
from rto_lightning.rewards.remote import RewardServer, ServedRole
from rto_lightning.rewards.remote.protocol import ScoreRequest, request_content
from rto_lightning.rollout import Trajectory
from tests.models import make_backbone, write_tiny_model
from tests.rewards.services import remote, responses, running
from tests.roles import save_random_role

TEXTS = ["Good day!", "No.", "cut off in the mid", "", "Yes, surely.", "cut", "1 2 3 4 5 6 7 8 9"]


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory):
    """The role in a run of its own."""
    folder = save_random_role(tiny_model, tmp_path_factory.mktemp("served") / "role", "reward")
    return make_reward_source(make_backbone(tiny_model, dtype="float32"), WeightedReward(folder))


@pytest.fixture(scope="module")
def role(source):
    return ServedRole(source.backbone, "reward", batch_size=3)


@pytest.fixture
def server(role):
    with running(RewardServer(("127.0.0.1", 0), role, max_bytes=200_000, max_rows=50)) as server:
        yield server


def post(server, content, **options):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return httpx2.post(server.url, content=body, trust_env=False, **options)


# Scores


def test_a_run_that_asks_gets_the_scores_of_the_role(source, server):
    prompts, trajectory = responses(source.backbone.chat, TEXTS)
    asked = remote(source.backbone.chat, server.url, batch_size=4)
    torch.testing.assert_close(
        asked.score(prompts, trajectory), source.score(prompts, trajectory).detach(), rtol=0, atol=1e-6
    )


def test_tokens_that_no_text_gives_are_scored_as_they_are(source, server):
    chat = source.backbone.chat
    prompts, _ = responses(chat, ["", ""])
    rows = [[200, 201, 130, 2], [1, 40, 2, 41]]  # bytes that are no UTF-8; special tokens in the middle
    trajectory = Trajectory(
        Sequences.from_lists(chat.encode_prompts(prompts), rows, chat.pad_id), torch.tensor([False, True])
    )
    torch.testing.assert_close(
        remote(chat, server.url).score(prompts, trajectory),
        source.score(prompts, trajectory).detach(),
        rtol=0,
        atol=1e-6,
    )


def test_clients_with_another_vocabulary_send_messages_and_texts(source, server):
    prompts, trajectory = responses(source.backbone.chat, TEXTS)
    content = request_content(prompts, trajectory, source.backbone.chat) | {"vocabulary": "another"}
    scores = post(server, content).json()["rewards"]
    torch.testing.assert_close(torch.tensor(scores), source.score(prompts, trajectory).detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("keys", [("query",), ("query", "prompts"), ("query", "prompts", "labels")])
def test_clients_of_openrlhf_send_one_text(source, server, keys):
    prompts, trajectory = responses(source.backbone.chat, TEXTS)
    content = request_content(prompts, trajectory, source.backbone.chat)
    answer = post(server, {key: content[key] for key in keys}).json()
    assert answer["scores"] == answer["rewards"]
    torch.testing.assert_close(
        torch.tensor(answer["rewards"]), source.score(prompts, trajectory).detach(), rtol=0, atol=1e-6
    )


def test_what_a_template_writes_after_the_stop_does_not_count(role, source):
    chat = source.backbone.chat
    messages = [{"role": "user", "content": "Hi"}]
    rendered = chat.tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "Hello"}], tokenize=False
    )
    assert rendered.endswith("<|im_end|>\n")
    assert role.encode(ScoreRequest([rendered])) == [chat.encode_prompt(messages) + chat.encode_response("Hello", 99)]
    assert role.encode(ScoreRequest(["Hello \n"])) == [chat.tokenizer("Hello \n")["input_ids"]]


def test_nothing_to_score_is_no_fault(server):
    assert post(server, {"query": []}).json() == {"rewards": [], "scores": []}


def test_requests_at_the_same_time_do_not_mix(source, server):
    chat = source.backbone.chat
    prompts, trajectory = responses(chat, TEXTS * 4)
    scores = remote(chat, server.url, batch_size=1, concurrency=12).score(prompts, trajectory)
    torch.testing.assert_close(scores, source.score(prompts, trajectory).detach(), rtol=0, atol=1e-6)


# What it refuses


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no JSON"),
        (b'{"query": ["a"', "no JSON"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 50_000, "no JSON"),
        (["a"], "no JSON object"),
        ({}, "no `query`"),
        ({"prompts": ["a"], "labels": ["b"]}, "no `query`"),
        ({"messages": [[{"role": "user", "content": "a"}]]}, "no `query`"),
        ({"query": "a"}, "`query` holds something else"),
        ({"query": ["a", 5]}, "`query` holds something else"),
        ({"query": ["\ud800"]}, "`query` holds something else"),
        ({"query": ["a"], "messages": [[]]}, "`messages` holds something else"),
        ({"query": ["a"], "messages": [[{"role": "user"}]]}, "`messages` holds something else"),
        ({"query": ["a"], "truncated": [1]}, "`truncated` holds something else"),
        ({"query": ["a"], "response_ids": [[1.5]]}, "`response_ids` holds something else"),
        ({"query": ["a"], "response_ids": [[-1]]}, "`response_ids` holds something else"),
        ({"query": ["a"], "response_ids": ["12"]}, "`response_ids` holds something else"),
        ({"query": ["a"], "responses": ["a", "b"]}, "differ in length"),
        ({"query": ["a"] * 51}, "51 responses, and at most 50"),
        ({"query": ["a", ""]}, "response 1 and its prompt have 0 tokens"),
        ({"query": ["a", "b" * 257]}, "response 1 and its prompt have 257 tokens; the model takes 1 to 256"),
    ],
)
def test_malformed_requests_are_told_what_is_wrong(server, content, message):
    answer = post(server, content)
    assert (answer.status_code, answer.headers["Content-Type"]) == (400, "application/json")
    assert message in answer.json()["error"]


def test_ids_outside_of_the_vocabulary_are_refused(server, source):
    ids = {"vocabulary": source.backbone.chat.fingerprint, "prompt_ids": [[5]], "response_ids": [[259]]}
    answer = post(server, {"query": ["a"], **ids})
    assert answer.status_code == 400 and "vocabulary" in answer.json()["error"]


def test_a_template_that_refuses_messages_is_quoted(server, source, monkeypatch):
    tokenizer = source.backbone.chat.tokenizer
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no such role') }}")
    answer = post(server, {"messages": [[{"role": "robot", "content": "a"}]], "responses": ["b"]})
    assert answer.status_code == 400 and "no such role" in answer.json()["error"]


def test_a_body_that_is_too_large_is_refused(server):
    for size in (200_001, 300_000):
        answer = post(server, b" " * size)
        assert answer.status_code == 413 and "200000 bytes" in answer.json()["error"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/"), ("GET", "/get_reward"), ("POST", "/"), ("POST", "/health")])
def test_other_paths_are_not_there(server, method, path):
    answer = httpx2.request(method, server.url.removesuffix("/get_reward") + path, trust_env=False)
    assert answer.status_code == 404 and "error" in answer.json()


def test_other_methods_and_no_http_at_all_get_an_answer_in_json(server):
    assert httpx2.delete(server.url, trust_env=False).json()["error"].startswith("Unsupported method")
    with socket.create_connection(server.server_address) as connection:
        connection.sendall(b'what "is" this\r\n\r\n')
        _, _, body = connection.makefile("rb").read().rpartition(b"\r\n\r\n")
    assert "error" in json.loads(body)


def test_a_body_without_length_is_refused(server):
    connection = http.client.HTTPConnection(*server.server_address[:2])
    connection.putrequest("POST", "/get_reward")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_health(server):
    answer = httpx2.get(server.url.replace("/get_reward", "/health"), trust_env=False)
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_only_clients_with_the_token_may_ask(role):
    with running(RewardServer(("127.0.0.1", 0), role, token="s3cret")) as server:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            answer = post(server, {"query": ["a"]}, headers=headers)
            assert answer.status_code == 401 and "s3cret" not in answer.text
        assert post(server, {"query": ["a"]}, headers={"Authorization": "Bearer s3cret"}).status_code == 200


def test_a_client_that_goes_away_hurts_nobody(server, capfd):
    for sent in (b"POST /get_reward HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", b"POST /get", b""):
        with socket.create_connection(server.server_address) as connection:
            connection.sendall(sent)
    assert post(server, {"query": ["a"]}).status_code == 200
    assert capfd.readouterr().err == ""


def test_what_goes_wrong_inside_is_logged_and_not_told(caplog):
    def fail(request):
        raise RuntimeError("CUDA error in /home/me")

    with running(RewardServer(("127.0.0.1", 0), fail)) as server:
        answer = post(server, {"query": ["a"]})
    assert answer.status_code == 500 and "home" not in answer.text
    assert "CUDA error in /home/me" in caplog.text


def test_a_score_that_is_not_finite_is_not_sent():
    with running(RewardServer(("127.0.0.1", 0), lambda request: [float("nan")])) as server:
        answer = post(server, {"query": ["a"]})
    assert answer.status_code == 400 and "not finite" in answer.json()["error"]


def test_too_many_requests_are_told_to_come_back(monkeypatch):
    monkeypatch.setattr("rto_lightning.rewards.remote.server.PLACES", 1)
    entered, leave = threading.Event(), threading.Event()

    def score(request):
        entered.set()
        leave.wait(60)
        return [1.0]

    with running(RewardServer(("127.0.0.1", 0), score)) as server:
        first = threading.Thread(target=post, args=(server, {"query": ["a"]}))
        first.start()
        assert entered.wait(60)
        answer = post(server, {"query": ["a"]})
        leave.set()
        first.join()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_closing_answers_what_has_come_in():
    entered, leave, answers = threading.Event(), threading.Event(), []

    def score(request):
        entered.set()
        leave.wait(60)
        return [1.0]

    with running(RewardServer(("127.0.0.1", 0), score)) as server:
        client = threading.Thread(target=lambda: answers.append(post(server, {"query": ["a"]}).json()))
        client.start()
        assert entered.wait(60)
        threading.Timer(0.2, leave.set).start()
    client.join()
    assert answers == [{"rewards": [1.0], "scores": [1.0]}]


def test_scores_of_a_whole_model_do_not_depend_on_the_batch(tmp_path):
    base = write_tiny_model(tmp_path / "base")
    folder = save_random_role(base, tmp_path / "role", "reward", mode="full")
    source = make_reward_source(make_backbone(base, dtype="float32", mode="full"), WeightedReward(folder))
    prompts, trajectory = responses(source.backbone.chat, TEXTS)
    expected = source.score(prompts, trajectory).tolist()
    with running(RewardServer(("127.0.0.1", 0), ServedRole(source.backbone, "reward", 1))) as server:
        scores = remote(source.backbone.chat, server.url).score(prompts, trajectory).tolist()
    assert scores == pytest.approx(expected, abs=1e-6)
