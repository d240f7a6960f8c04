"""Rollouts as transformers' `generate` makes them: one prompt at a time, the whole cumulative sum at every step."""

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


class CumulativeSampling(LogitsProcessor):
    """Inverse transform sampling: all logits but the drawn one become -inf, and greedy search takes that."""

    def __init__(self, seeds: list[int], max_new_tokens: int, temperature: float) -> None:
        self.uniforms = torch.stack(
            [torch.rand(max_new_tokens, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )
        self.temperature = temperature
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = cumulative_draw(scores, self.uniforms[:, self.step], self.temperature)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn[:, None], 0.0)


def cumulative_draw(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Tokens (N,) from logits (N, V) and uniform numbers (N,)."""
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1).squeeze(-1)


def generated_responses(
    model: torch.nn.Module,
    prompts: list[list[int]],
    seeds: list[int],
    stop_ids: tuple[int, ...],
    max_new_tokens: int,
    temperature: float,
) -> list[list[int]]:
    """The response to each prompt, by `generate` without any batching; temperature 0 is greedy."""
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    responses = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        processors = LogitsProcessorList()
        if temperature > 0:
            processors.append(CumulativeSampling([seed], max_new_tokens, temperature))
        ids = torch.tensor([prompt])
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            logits_processor=processors,
        )
        responses.append(tokens[0, len(prompt) :].tolist())
    return responses
