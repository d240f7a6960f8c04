"""What every contender of the PPO step has to do, and how a contender runs; the standard library only.

TRL's contenders run in an environment without rto_lightning, so this file must import without it.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One PPO iteration: sampled from which model, and how much of it."""

    folder: str
    """Where `prepare` puts prompts and roles, and a random model."""
    source: str | None = None
    """Folder of a model; None makes a random one of SmolLM2-135M's shape."""
    tiny: bool = False
    """The random model has two layers of width 64: a trial of the machinery."""
    prompts: int = 16
    """Prompts of an iteration, one response to each."""
    prompt_tokens: int = 32
    """Tokens of every prompt."""
    new_tokens: int = 48
    """Tokens of every response; none stops earlier."""
    microbatch: int = 4
    """Samples of each forward and backward of the update."""
    rank: int = 8
    """Rank of the LoRA adapters on all linear layers; alpha is twice this."""
    dtype: str = "float32"
    """`float32` or `bfloat16`: of frozen weights here, of all weights but adapters in TRL."""
    threads: int = 2
    """Threads of a contender."""
    iterations: int = 2
    """Iterations that count; a warm-up iteration goes before them."""

    @property
    def model(self) -> Path:
        """The model that all contenders load."""
        return Path(self.folder) / "model"

    @property
    def prompts_file(self) -> Path:
        """JSON lines with `prompt` (text) and `input_ids` of each prompt, enough for all iterations."""
        return Path(self.folder) / "prompts.jsonl"

    def role(self, name: str) -> Path:
        """Folder of a saved role."""
        return Path(self.folder) / name

    @property
    def steps(self) -> int:
        """Iterations, the warm-up included."""
        return self.iterations + 1

    @property
    def sampled_tokens(self) -> int:
        """Response tokens of an iteration."""
        return self.prompts * self.new_tokens

    @property
    def scoring_batch(self) -> int:
        """Samples of a forward without gradients, as `ppo.scoring_batch_size` is by default."""
        return 2 * self.microbatch

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Work":
        """Read what `write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))


Measured = dict[str, Any]
"""What a contender found: `seconds` and `phases` of each iteration, `prompt_tokens` and `sampled_tokens` of each,
`memory` in bytes and `versions`; except for the floor, `trained_weights`, their number; and of this project whether
`sampling_logprobs` were kept."""


def resident_memory(peak: bool) -> int:
    """Resident memory of this process in bytes, now or at its peak (Linux).

    `ru_maxrss` would not do: it starts with what the parent had when it forked.
    """
    name = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name} line")


def set_environment(threads: int) -> dict[str, str]:
    """The environment of a contender: CPU only, so many threads, no network."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def contend(measure: Callable[[Work, str], Measured]) -> None:
    """Body of a contender's process, started as `python -m MODULE CONTENDER WORK_FILE RESULT_FILE`."""
    contender, work_file, result_file = sys.argv[1:]
    import torch

    work = Work.read(Path(work_file))
    torch.set_num_threads(work.threads)
    imports = resident_memory(peak=False)
    measured = measure(work, contender)
    measured["memory"] = {"imports": imports, "peak": resident_memory(peak=True)}
    measured.setdefault("versions", {})["torch"] = torch.__version__
    Path(result_file).write_text(json.dumps(measured), encoding="utf-8")
