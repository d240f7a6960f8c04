"""HTTP reward services: asking them, and being one."""

from rto_lightning.rewards.remote.served_role import ServedRole
from rto_lightning.rewards.remote.server import RewardServer
from rto_lightning.rewards.remote.settings import RewardServiceSettings, service_urls, token_of
from rto_lightning.rewards.remote.source import RemoteReward

__all__ = ["RemoteReward", "RewardServer", "RewardServiceSettings", "ServedRole", "service_urls", "token_of"]
