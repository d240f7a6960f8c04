"""Which roles an RTO run needs, checked before anything is loaded."""

from rto_lightning.backbone.roles import role_folder
from rto_lightning.errors import UserError
from rto_lightning.modules.rto_settings import CriticSettings, RewardSettings
from rto_lightning.rewards import saved_reward_role


def check_inputs(
    dpo: str | None, reward: str | None, reward_function: str | None, rewards: RewardSettings, critic: CriticSettings
) -> None:
    """Compare the roles that are named with what the coefficients of the reward ask for.

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
    if reward is not None and reward_function is not None:
        raise UserError("model.reward and model.reward_function are both set; set one of them to null.")
    if rewards.beta_3 != 0 and reward is None and reward_function is None:
        raise UserError(
            "rewards.beta_3 is not 0, which needs model.reward or model.reward_function; set one, or beta_3 to 0."
        )
    has_reward_role = rewards.beta_3 != 0 and saved_reward_role(reward) is not None
    if critic.init == "reward" and not has_reward_role:
        raise UserError("critic.init is reward, but no saved reward role is used; set critic.init to policy.")
    if critic.init not in ("reward", "policy") and role_folder(critic.init, "reward") is None:
        raise UserError(f"critic.init is {critic.init}; set it to reward, policy or the folder of a saved role.")
