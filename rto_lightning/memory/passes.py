"""How often a process reads, samples and trains in an iteration: what communication and computation follow from."""

from rto_lightning.memory.workload import OutsideModel, Passes, Reading, RoleWeights
from rto_lightning.modules import RTOModule


def rto_passes(
    module: RTOModule,
    roles: tuple[RoleWeights, ...],
    outside: tuple[OutsideModel, ...],
    samples: int,
    minibatch: int,
    scoring_rows: int,
    keeps_logprobs: bool,
) -> tuple[Passes, ...]:
    """Those of one RTO iteration in which policy and critic are trained.

    Args:
        module: the stage.
        roles: its roles.
        outside: reward models that share nothing with the base.
        samples: responses of an iteration, of this process.
        minibatch: those of them in a minibatch.
        scoring_rows: those that are scored at a time.
        keeps_logprobs: whether the rollout keeps the policy's log-probabilities.
    """
    rollout, names = module.rollout_settings, {role.name for role in roles}
    sampled = min(rollout.batch_size or samples, samples)
    batches = -(-samples // sampled)
    made = [Passes("rollout", "policy", "logprobs", samples, batches, new_tokens=rollout.max_new_tokens)]
    if rollout.engine == "vllm":  # gets the policy handed over, of adapters only the adapter
        made = [Passes("rollout", "policy", "logprobs", 0, 1)] if module.settings.mode == "full" else []

    readings: list[tuple[str, Reading]] = [] if keeps_logprobs else [("policy", "logprobs and entropy")]
    readings += [(role.name, reading) for role in roles if (reading := scoring_reading(role)) is not None]
    if "dpo" in names and "dpo_reference" not in names and module.rollout_settings.temperature not in (0.0, 1.0):
        readings.append(("reference", "logprobs"))  # DPO's is read at temperature 1, the KL's at that of the rollout
    readings += [(model.source, "score") for model in outside]
    batches = -(-samples // scoring_rows)
    made += [Passes("scoring", role, reading, samples, batches) for role, reading in readings]

    steps = module.ppo.epochs * (samples // minibatch)
    rows, batches = module.ppo.epochs * samples, steps * -(-minibatch // min(module.ppo.microbatch_size, minibatch))
    shared = any(role.kind == "shared" for role in roles)
    name = "update of policy and critic" if shared else "update of policy"
    made.append(Passes(name, "policy", "logprobs", rows, batches, steps))
    if shared:
        made.append(Passes(name, "critic", "values", 0, 0, steps))  # a head whose gradient is summed, no forward
    elif "critic" in names:
        made.append(Passes("update of critic", "critic", "values", rows, batches, steps))
    return tuple(made)


def scoring_reading(role: RoleWeights) -> Reading | None:
    """What a role but the policy is read for while a trajectory is scored; None if it is not."""
    if role.name in ("reference", "dpo", "dpo_reference"):
        return "logprobs"
    if role.name == "critic" and role.kind != "shared":
        return "values"
    return "score" if role.name.startswith("reward") else None
