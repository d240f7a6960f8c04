"""Which roles an RTO run needs, checked before anything is loaded."""

from collections.abc import Sequence

from lightning.pytorch import Trainer

from rto_lightning.backbone.roles import role_folder
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_settings import CriticSettings, PPOSettings, RewardSettings
from rto_lightning.rewards import RewardServiceSettings, WeightedReward, saved_reward_role


def check_even_rows(trainer: Trainer, together: bool) -> None:
    """Refuse to predict rows that the devices cannot share evenly.

    Args:
        trainer: predicts the rows of a data module.
        together: whether the devices have to compute each batch together.

    Raises:
        UserError: if they have to, and some would have a row more than others.
    """
    rows = getattr(getattr(trainer, "datamodule", None), "rows", {}).get("predict", ())
    if together and len(rows) % trainer.world_size:
        raise UserError(
            f"the {len(rows)} rows of data.predict do not split evenly over {trainer.world_size} devices, which "
            f"compute each batch together; set data.max_eval_rows to {len(rows) - len(rows) % trainer.world_size}, or "
            "trainer.devices to 1."
        )


def check_rewards(dpo: str | None, sources: Sequence[WeightedReward], rewards: RewardSettings) -> None:
    """Compare what is named to reward with what the coefficients of the reward ask for.

    Raises:
        MissingInputError: if a folder does not exist.
        UserError: if an input is missing, or two contradict each other.
    """
    if rewards.beta_1 != 0:
        if dpo is None:
            raise UserError(
                "rewards.beta_1 is not 0, which needs a DPO role; set model.dpo, or beta_1 to 0 for plain PPO."
            )
        role_folder(dpo, "dpo")
    if rewards.granularity != "token" and rewards.beta_1 == 0:
        raise UserError(
            f"rewards.granularity {rewards.granularity} moves token rewards, of which beta_1 0 leaves none; set beta_1 "
            "above 0, or granularity to token."
        )
    if rewards.beta_3 != 0 and not sources:
        raise UserError(
            "rewards.beta_3 is not 0, which needs model.reward, model.reward_function or model.reward_url; set one, or "
            "beta_3 to 0."
        )
    if not (rewards.beta_1 or rewards.beta_3 or rewards.truncation_penalty or rewards.short_penalty):
        raise UserError("rewards.beta_1 and rewards.beta_3 are both 0, so that nothing is rewarded; set one of them.")


def check_training(
    sources: Sequence[WeightedReward], rewards: RewardSettings, ppo: PPOSettings, critic: CriticSettings
) -> None:
    """Compare the reward with how it is trained on, and what a critic starts from with what there is.

    Raises:
        MissingInputError: if a folder does not exist.
        UserError: if two settings contradict each other.
    """
    if rewards.granularity == "shaping" and ppo.gamma != 1:
        raise UserError(
            "rewards.granularity shaping leaves the return of a response unchanged only without discount, but "
            f"ppo.gamma is {ppo.gamma}; set it to 1."
        )
    saved = [saved_reward_role(source.reward) for source in sources] if rewards.beta_3 != 0 else []
    if not ppo.has_critic:
        if critic.warmup_iterations > 0:
            raise UserError(
                f"critic.warmup_iterations waits for a critic, and ppo.estimator {ppo.estimator} has none; set it to 0."
            )
        return
    if critic.shared:
        return
    if critic.init == "reward" and rewards.beta_3 == 0:
        raise UserError(
            "critic.init is reward, but rewards.beta_3 is 0, so no reward role is loaded; set critic.init to policy."
        )
    if critic.init == "reward" and (not saved or saved[0] is None):
        raise UserError(
            "critic.init is reward, but model.reward is no saved reward role; set critic.init to policy or to a folder."
        )
    if critic.init not in ("reward", "policy") and role_folder(critic.init, "reward") is None:
        raise UserError(f"critic.init is {critic.init}; set it to reward, policy or the folder of a saved role.")


def reward_sources(
    reward: str | None,
    reward_function: str | None,
    reward_url: list[str] | str | None,
    reward_service: RewardServiceSettings,
    more: Sequence[WeightedReward],
    beta_3: float,
) -> list[WeightedReward]:
    """All sources of scores, the first of them with weight 1.

    Raises:
        UserError: if there are two first ones, or more of them while scores do not count.
    """
    if more and beta_3 == 0:
        raise UserError("model.more_rewards are scores, of which rewards.beta_3 0 leaves none; remove them.")
    named = {"model.reward": reward, "model.reward_function": reward_function, "model.reward_url": reward_url}
    given = [name for name, value in named.items() if value is not None]
    if not given:
        return list(more)
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} are both set; set one to null, and name it in model.more_rewards.")
    return [WeightedReward(reward, reward_function, reward_url, reward_service=reward_service), *more]
