"""The floor of a PPO step: bare `generate`, forwards and backwards of the same shapes with transformers and PEFT.

Each part is what no implementation on this stack can leave out, and nothing else: no rewards, no advantages, no
optimizer step. The output layer is applied to response positions only, and turned into log-probabilities.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.benchmarks.ppo_step_work import Measured, Work, contend


def measure(work: Work, _: str = "floor") -> Measured:
    """Time the parts in each iteration."""
    floor = Floor(work)
    rows = [json.loads(line)["input_ids"] for line in work.prompts_file.read_text(encoding="utf-8").splitlines()]
    measured: Measured = {"phases": {}, "prompt_tokens": [], "sampled_tokens": []}
    for step in range(work.steps):
        prompts = torch.tensor(rows[step * work.prompts : (step + 1) * work.prompts])
        tokens, seconds = _timed(partial(floor.generate, prompts))
        measured["phases"].setdefault("generate", []).append(seconds)
        for name, part in floor.parts(tokens).items():
            _, seconds = _timed(part)
            measured["phases"].setdefault(name, []).append(seconds)
        measured["prompt_tokens"].append(prompts.numel())
        measured["sampled_tokens"].append(int((tokens[:, work.prompt_tokens :] != floor.stop).sum()))
    measured["versions"] = {package.__name__: package.__version__ for package in (transformers, peft)}
    return measured


class Floor:
    """A base model with one LoRA adapter, put on by PEFT.

    Args:
        work: the shapes.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        base = AutoModelForCausalLM.from_pretrained(work.model, dtype=getattr(torch, work.dtype))
        self.stop: int = base.generation_config.eos_token_id
        base.generation_config = GenerationConfig()
        config = LoraConfig(
            r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(base, config)
        hidden = base.config.hidden_size
        self.head = torch.nn.Linear(hidden, 1, bias=False, dtype=base.dtype)

    def generate(self, prompts: Tensor) -> Tensor:
        """Sample responses to prompts (B, P); returns both, (B, P+T)."""
        config = GenerationConfig(
            max_new_tokens=self.work.new_tokens, do_sample=True, top_k=0, top_p=1.0, pad_token_id=self.stop
        )
        self.model.eval()
        with torch.no_grad():
            tokens: Tensor = self.model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config
            )
        self.model.train()
        return tokens

    def parts(self, tokens: Tensor) -> dict[str, Callable[[], None]]:
        """The parts after `generate`, by name; each handles all tokens (B, P+T)."""

        def reference() -> None:
            with self.model.disable_adapter():
                self._forward(tokens, self._policy_loss)

        return {
            "forward_head": lambda: self._forward(tokens, self._policy_loss),
            "forward_head_reference": reference,
            "forward_body": lambda: self._forward(tokens, self._value_loss),
            "backward_head": lambda: self._backward(tokens, self._policy_loss),
            "backward_body": lambda: self._backward(tokens, self._value_loss),
        }

    def _forward(self, tokens: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            for part in tokens.split(self.work.scoring_batch):
                loss(part)

    def _backward(self, tokens: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        for part in tokens.split(self.work.microbatch):
            loss(part).backward()
        self.model.zero_grad(set_to_none=True)

    def _hidden(self, tokens: Tensor) -> Tensor:
        """Hidden states before each response token, (B * T, H)."""
        decoder = self.model.get_base_model().get_decoder()
        states = decoder(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).last_hidden_state
        # A frozen output layer is many times slower on a slice that is not contiguous; flatten makes a copy.
        hidden: Tensor = states[:, self.work.prompt_tokens - 1 : -1].flatten(0, 1)
        return hidden

    def _policy_loss(self, tokens: Tensor) -> Tensor:
        logits = self.model.get_base_model().get_output_embeddings()(self._hidden(tokens))
        return cross_entropy(logits.float(), tokens[:, self.work.prompt_tokens :].flatten())

    def _value_loss(self, tokens: Tensor) -> Tensor:
        return self.head(self._hidden(tokens)).float().square().mean()


def _timed(part: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = part()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    contend(measure)
