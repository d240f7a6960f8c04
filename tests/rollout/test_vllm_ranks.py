"""Two ranks that share a server: one of them hands the weights over, and a crash that one meets is met by both."""

import threading

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from rto_lightning.backbone.sharding import Sharding
from rto_lightning.parallel import rank
from rto_lightning.rollout import RolloutSettings, VLLMSettings, build_engine
from rto_lightning.rollout.vllm import EngineStopped
from tests.models import make_backbone, randomize, write_tiny_model
from tests.rollout.fake_server import FakeServer

PROMPTS = [[[1, 40, 41], [1, 50]], [[1, 60], [1, 70, 71]]]
STOP = 2


def _adapters(model, folder, address):
    engine = _engine(model, folder, address, "adapters")
    trajectory = _rollout(engine)
    randomize(engine.backbone.trained_parameters("policy"))
    _rollout(engine)
    if rank() == 1:
        sample = engine.client.sample

        def crash(*args):
            engine.client.sample = sample
            raise EngineStopped("gone")

        engine.client.sample = crash
    _rollout(engine)
    assert engine.restarted
    sequences = trajectory.sequences
    responses = [ids[mask].tolist() for ids, mask in zip(sequences.response_ids, sequences.response_mask, strict=True)]
    assert responses == [[*reversed(prompt), STOP] for prompt in PROMPTS[rank()]]
    engine.close()


def _full(model, folder, address):
    engine = _engine(model, folder, address, "full")
    torch.manual_seed(0)
    randomize(engine.backbone.trained_parameters("policy"))
    if rank() == 0:
        torch.save(engine.backbone.models["policy"].state_dict(), f"{folder}/expected.pt")
    engine.backbone.shard(Sharding(init_device_mesh("cpu", (2,))))
    _rollout(engine)
    engine.close()


def _engine(model, folder, address, mode):
    torch.manual_seed(0)
    backbone = make_backbone(model, mode=mode, dtype="float32")
    backbone.add_role("reference")
    backbone.add_role("policy", trainable=True)
    vllm = VLLMSettings("server", urls=[address], transfer_folder=f"{folder}/transfer", start_timeout=5.0)
    return build_engine(backbone, RolloutSettings(9, engine="vllm", vllm=vllm))


def _rollout(engine):
    rows = PROMPTS[rank()]
    width = max(map(len, rows))
    ids = torch.tensor([[STOP] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return engine.rollout("policy", ids, mask, [STOP] * len(rows))


def _run(number, work, model, folder, address):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=number, world_size=2)
    work(model, folder, address)
    dist.destroy_process_group()


@pytest.fixture
def requests(tmp_path):
    """Runs work on two ranks and returns what the server was asked."""
    with FakeServer() as server:
        server.kept_weights = str(tmp_path / "kept")
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def run(work):
            model = write_tiny_model(tmp_path / "model", tie_word_embeddings=False)
            multiprocessing.spawn(_run, (work, str(model), str(tmp_path), server.address), nprocs=2)
            return server.requests

        yield run
        server.shutdown()


@pytest.mark.slow
def test_one_rank_hands_adapters_over(requests, tmp_path):
    asked = requests(_adapters)
    loaded = [content["lora_name"] for path, content in asked if path == "/v1/load_lora_adapter"]
    unloaded = [content["lora_name"] for path, content in asked if path == "/v1/unload_lora_adapter"]
    assert len(loaded) == len(set(loaded)) == 3  # at first, after the change, after the crash
    assert unloaded == loaded[:1]
    asked_of = [content["model"] for path, content in asked if path == "/v1/completions"]
    # Of the third rollout rank 0 had its two answers when rank 1 told of the crash.
    assert asked_of == [loaded[0]] * 4 + [loaded[1]] * 4 + [loaded[1]] * 2 + [loaded[2]] * 4
    assert not list((tmp_path / "transfer").iterdir())


@pytest.mark.slow
def test_sharded_weights_are_gathered_and_written_once(requests, tmp_path):
    asked = requests(_full)
    assert [path for path, _ in asked if path != "/v1/completions"] == ["/collective_rpc", "/reset_prefix_cache"]
    expected = torch.load(tmp_path / "expected.pt")
    written = load_file(tmp_path / "kept" / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], weight) for name, weight in expected.items())
