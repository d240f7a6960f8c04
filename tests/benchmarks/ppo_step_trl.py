"""TRL's last PPO trainer (trl 1.12.0, `trl.experimental.ppo`) at the same work, in an environment of its own.

Its `peft_config` wraps the policy only. `trl` hands it a value model that is trained in full, as its documentation
does; `trl_lora_value` one whose body has the same LoRA adapters as the policy. Prompts are sampled and scored all at
once, which is faster than in micro-batches and takes less memory than its update. An iteration lasts from the end of
one step to the end of the next.
"""

import json
import time
from typing import Any

import peft
import torch
import transformers
import trl
import trl.experimental.ppo.ppo_trainer as ppo_trainer
from datasets import Dataset
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.benchmarks.ppo_step_work import Measured, Work, contend


def measure(work: Work, contender: str) -> Measured:
    """Train for `work.steps` iterations."""
    rows = [json.loads(line)["input_ids"] for line in work.prompts_file.read_text(encoding="utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    # PPOTrainer takes `token != pad` for its mask. Without `stop_token`, which is its default, nothing ends a response.
    assert all(len(row) == work.prompt_tokens and tokenizer.pad_token_id not in row for row in rows)
    config = PPOConfig(
        output_dir=f"{work.folder}/trl",
        per_device_train_batch_size=work.microbatch,
        gradient_accumulation_steps=work.prompts // work.microbatch,
        local_rollout_forward_batch_size=work.prompts,
        num_ppo_epochs=1,
        num_mini_batches=1,
        total_episodes=work.prompts * work.steps,
        response_length=work.new_tokens,
        temperature=1.0,
        learning_rate=1e-5,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        config,
        tokenizer,
        model=load(work, AutoModelForCausalLM),
        ref_model=None,  # the policy without its adapter
        reward_model=load(work, AutoModelForSequenceClassification, num_labels=1).requires_grad_(False),
        value_model=value_model(work, contender),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[: work.prompts]}),  # never read, but a loader is made of it
        peft_config=lora(work, "CAUSAL_LM"),
    )
    watch = Watch(work, tokenizer.pad_token_id)
    trainer.add_callback(watch)
    watch.wrap()
    trainer.train()
    packages: tuple[Any, ...] = (trl, transformers, peft)
    trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    versions = {package.__name__: package.__version__ for package in packages}
    return {**watch.measured, "versions": versions, "trained_weights": trained}


def load(work: Work, kind: Any, **options: Any) -> Any:
    """The model with the data type of the run."""
    return kind.from_pretrained(work.model, dtype=getattr(torch, work.dtype), **options)


def lora(work: Work, task: str | None) -> LoraConfig:
    """The adapters that this project has by the same settings."""
    return LoraConfig(
        r=work.rank, lora_alpha=2 * work.rank, target_modules="all-linear", lora_dropout=0.0, task_type=task
    )


def value_model(work: Work, contender: str) -> Any:
    """A model with one label, trained in full or by adapters on its body."""
    model = load(work, AutoModelForSequenceClassification, num_labels=1)
    if contender == "trl_lora_value":
        # Into the body, in place: the trainer reads `model.model` and `model.score`, which a PeftModel hides.
        inject_adapter_in_model(lora(work, None), model.model)
        if work.dtype != "float32":
            for weight in model.model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()  # as `get_peft_model` does for the policy
    return model


class Watch(TrainerCallback):
    """Times iterations and phases, and counts tokens.

    Rollout is `batch_generation`; scoring goes from there to the first forward with gradients; the rest is update.
    """

    def __init__(self, work: Work, pad_id: int) -> None:
        self.work, self.pad_id = work, pad_id
        phases: dict[str, list[float]] = {"rollout": [], "scoring": [], "update": []}
        self.measured: Measured = {"seconds": [], "phases": phases, "prompt_tokens": [], "sampled_tokens": []}
        self._last = self._rollout_end = 0.0
        self._update_start: float | None = None

    def wrap(self) -> None:
        """Put timers around two functions of TRL's module."""
        generation, forward = ppo_trainer.batch_generation, ppo_trainer.forward

        def timed_generation(model: Any, queries: Any, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = generation(model, queries, *args, **kwargs)
            self._rollout_end = time.perf_counter()
            self.measured["phases"]["rollout"].append(self._rollout_end - start)
            self.measured["prompt_tokens"].append(int((queries != self.pad_id).sum()))
            responses = result[0][:, queries.shape[1] :]
            self.measured["sampled_tokens"].append(int((responses != self.pad_id).sum()))
            return result

        def watched_forward(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() and self._update_start is None:
                self._update_start = time.perf_counter()
                self.measured["phases"]["scoring"].append(self._update_start - self._rollout_end)
            return forward(*args, **kwargs)

        ppo_trainer.batch_generation, ppo_trainer.forward = timed_generation, watched_forward

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """The first iteration begins."""
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """An iteration ends."""
        now = time.perf_counter()
        assert self._update_start is not None
        self.measured["seconds"].append(now - self._last)
        self.measured["phases"]["update"].append(now - self._update_start)
        self._update_start = None
        self._last = time.perf_counter()


if __name__ == "__main__":
    contend(measure)
