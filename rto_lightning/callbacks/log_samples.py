"""Answers to the same few prompts while RTO trains: as a table, with token rewards, on the disk and in the loggers."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from rto_lightning.algorithms import masked_sum
from rto_lightning.callbacks.iterations import RolloutCallback, check_every
from rto_lightning.callbacks.media import log_figure, log_page, log_table, takes_pictures
from rto_lightning.data import PromptBatch
from rto_lightning.data.module import ChatDataModule
from rto_lightning.errors import UserError
from rto_lightning.inspection import TokenRewardPage, rewarded_responses
from rto_lightning.inspection.picture import token_reward_picture
from rto_lightning.inspection.samples import SAMPLES_FILE, Sample, first_and_last, read_samples
from rto_lightning.modules import RTOModule
from rto_lightning.modules.rewarded_rollouts import EVALUATION, RewardedRollouts
from rto_lightning.runs.files import check_room, written_whole

PAGE_FILE = "samples.html"
"""Name of the page inside a stage's folder: the first answers beside the latest ones."""
_COLUMNS = ("prompt", "response", "score", "token rewards", "KL", "total reward", "tokens", "truncated")


class LogSamples(RolloutCallback):
    """Samples answers to fixed prompts before training, every so many iterations, and at the end.

    The prompts are the first ones of `data.validation`, or without it of `data.train`, and the draws are the same each
    time, so that what changes is the policy; training is what it would be without. The folder of the stage gets
    `samples.jsonl` (every answer, with the reward of each token) and `samples.html` (the first answers beside the
    latest ones); TensorBoard gets the table and a picture of token rewards, Weights & Biases the table and the page.

        trainer:
          callbacks:
            - class_path: LogSamples
              init_args: {prompts: 4, every_n_iterations: 10}

    Args:
        prompts: How many prompts are answered.
        every_n_iterations: Iterations between two times.

    Raises:
        UserError: if one of them is below 1.
    """

    def __init__(self, prompts: int = 4, every_n_iterations: int = 10) -> None:
        if prompts < 1:
            raise UserError(f"LogSamples.prompts is {prompts}; set it to 1 or more.")
        self.prompts = prompts
        self.every_n_iterations = check_every(self, every_n_iterations)
        self.samples: list[Sample] = []
        """What was sampled so far in this run, on rank zero."""
        self._batch: PromptBatch | None = None
        self._sampled_at = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a stage that samples nothing.

        Raises:
            UserError: for every stage but RTO, and where no prompts can be told from others.
        """
        super().on_fit_start(trainer, pl_module)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ChatDataModule):
            raise UserError("LogSamples takes its prompts from a PromptDataModule; remove it from trainer.callbacks.")
        self._batch = data.first_rows(self.prompts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample before the first iteration; in a run that goes on, forget what it will sample again."""
        self.samples, self._sampled_at = [], -1
        if trainer.global_step > 0:
            known = read_samples(self._folder(trainer) / SAMPLES_FILE)
            self.samples = [sample for sample in known if sample.iteration <= trainer.global_step]
            self._sampled_at = max((sample.iteration for sample in self.samples), default=-1)
        if trainer.is_global_zero:
            self._write(trainer, "w", self.samples)
        assert isinstance(pl_module, RTOModule)
        pl_module.ensure_score_statistics()  # a callback comes before the stage's own `on_train_start`
        if trainer.global_step % self.every_n_iterations == 0:
            self._sample(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Sample when it is time to."""
        if trainer.global_step % self.every_n_iterations == 0:
            self._sample(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sample what training has come to."""
        self._sample(trainer, pl_module)

    def _sample(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every rank answers all prompts, since all compute together; rank zero keeps the answers."""
        if self._sampled_at == trainer.global_step:
            return
        self._sampled_at = trainer.global_step
        assert isinstance(pl_module, RewardedRollouts) and self._batch is not None
        batch = self._batch.to(pl_module.device)
        with torch.no_grad(), trainer.precision_plugin.val_step_context():
            trajectory = pl_module.rollout(batch, EVALUATION, pl_module.saved_role)
            rewarded = pl_module.reward(trajectory, batch.messages, pl_module.saved_role)
        if not trainer.is_global_zero:
            return
        scores = None if rewarded.scores is None else rewarded.scores[:, 0]
        tokens = rewarded.terms.token
        responses = rewarded_responses(pl_module.chat, batch.messages, trajectory.sequences, tokens, scores)
        kl, total = (masked_sum(table, rewarded.mask, dim=1).tolist() for table in (rewarded.kl, rewarded.terms.total))
        new = [
            Sample(trainer.global_step, number, response, kl[number], total[number], bool(trajectory.truncated[number]))
            for number, response in enumerate(responses)
        ]
        self.samples += new
        self._write(trainer, "a", new)
        self._show(trainer, pl_module, new)

    def _write(self, trainer: Trainer, mode: str, samples: list[Sample]) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._folder(trainer) / SAMPLES_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(sample.row(), ensure_ascii=False) + "\n" for sample in samples]
        if mode == "w":
            with written_whole(path, "w", encoding="utf-8") as file:
                file.writelines(lines)
            return
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            check_room(error, path)
            raise

    def _show(self, trainer: Trainer, pl_module: RewardedRollouts, new: list[Sample]) -> None:
        step = trainer.global_step
        page = TokenRewardPage(first_and_last(self.samples), "Samples", _facts(pl_module), unit="")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            page.save(self._folder(trainer) / PAGE_FILE)
        if not takes_pictures(trainer):
            return
        log_table(trainer, "samples/table", _COLUMNS, [_table_row(sample) for sample in new], step)
        if pl_module.rewards.beta_1 != 0:
            log_figure(trainer, "samples/token_rewards", token_reward_picture([s.rewarded for s in new]), step)
        log_page(trainer, "samples/page", page, step)

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir)


def _facts(module: RewardedRollouts) -> dict[str, str]:
    """What the token rewards of a page are."""
    rewards = module.rewards
    if rewards.beta_1 == 0:
        return {"token rewards": "none, since beta_1 is 0"}
    return {
        "token rewards": "as trained on, in units of the reward",
        "beta_1": f"{rewards.beta_1:g}",
        "token_reward_clip": f"{rewards.token_reward_clip:g}",
        "granularity": rewards.granularity,
    }


def _table_row(sample: Sample) -> list[Any]:
    rewarded = sample.rewarded
    prompt = " / ".join(turn["content"] for turn in rewarded.prompt)
    figures = [rewarded.score, rewarded.total, sample.kl, sample.total, len(rewarded.rewards), sample.truncated]
    return [prompt, rewarded.response, *figures]
