"""From a stage's module and data to what they do in memory."""

from typing import Any

from rto_lightning.data import DemonstrationDataModule, PreferenceDataModule, PromptDataModule
from rto_lightning.memory.parallelism import ONE_PROCESS, Parallelism
from rto_lightning.memory.passes import rto_passes, scoring_reading
from rto_lightning.memory.roles import copies_base_later, outside_models_of, roles_of
from rto_lightning.memory.workload import (
    Forward,
    OutsideModel,
    Passes,
    Phase,
    Reading,
    RoleWeights,
    Rollout,
    Workload,
)
from rto_lightning.modules import PreferenceModule, RewardModelModule, RTOModule, SFTModule, StageModule
from rto_lightning.modules.reading import reads_while_sampling
from rto_lightning.rollout import RolloutSettings


def workload_of(
    module: StageModule, data: Any, precision: str = "32-true", parallelism: Parallelism = ONE_PROCESS
) -> Workload:
    """What a process of a stage holds and computes while it trains, at the longest prompts and responses allowed.

    Args:
        module: the stage, whose models need not be loaded.
        data: its data module, which need not be set up.
        precision: `trainer.precision`.
        parallelism: how the stage is spread over processes.

    Raises:
        TypeError: if they are no stage and data of this project.
        UserError: if the batches cannot be shared equally by the processes.
    """
    if isinstance(module, RTOModule) and isinstance(data, PromptDataModule):
        return _rto(module, data, precision, parallelism)
    kinds = {SFTModule: DemonstrationDataModule, PreferenceModule: PreferenceDataModule}
    kinds[RewardModelModule] = PreferenceDataModule
    for stage, kind in kinds.items():
        if isinstance(module, stage) and isinstance(data, kind):
            return _supervised(module, data, precision, parallelism)
    raise TypeError(f"no memory plan is known for {type(module).__name__} with {type(data).__name__}")


def _supervised(module: StageModule, data: Any, precision: str, parallelism: Parallelism) -> Workload:
    """SFT, the preference losses and the reward model: one forward and backward of a batch."""
    role, pairs = module.trained_role, isinstance(data, PreferenceDataModule)
    batch = parallelism.share(data.batch_size, "data.batch_size")
    rows, eval_rows = batch * (1 + pairs), data.eval_batch_size * (1 + pairs)
    reading: Reading = "score" if isinstance(module, RewardModelModule) else "logprobs"
    cached = False
    before: list[Phase] = []
    if isinstance(module, PreferenceModule):
        cached = module.reference_cache is not None and module.loss != "simpo"
        if module.loss in ("tdpo1", "tdpo2"):
            reading = "divergence"
        elif module.loss != "simpo" and not cached:
            before.append(Phase("reference", (Forward("reference", "logprobs", rows),), (role,)))
    if cached:
        reader = role if module.settings.mode == "full" else "reference"
        parts = (Forward(reader, "logprobs", eval_rows),)
        before.append(Phase("reference cache", parts, copies_base=copies_base_later(module)))
    phases = [*before, Phase("update", (Forward(role, reading, rows, backward=True),), (role,))]
    if data.sources["validation"] is not None:
        phases.append(Phase("validation", (Forward(role, reading, eval_rows),), (role,)))
    if isinstance(module, RewardModelModule) and module.score_statistics.samples > 0:
        answers = Rollout(role, batch, module.score_statistics.max_new_tokens)
        phases.append(Phase("score statistics", (answers,), (role,), copies_base_later(module)))
    unit = "pairs" if pairs else "demonstrations"
    passes = [Passes(phase.name, "reference", "logprobs", rows, 1) for phase in before if phase.name == "reference"]
    if reading == "divergence":
        passes.append(Passes("update", "reference", "logprobs", rows, 1))
    passes.append(Passes("update", role, reading, rows, 1, steps=1))
    return Workload(
        stage=module.stage_name,
        backbone=module.settings,
        roles=roles_of(module),
        phases=tuple(phases),
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=data.max_response_tokens,
        batch=f"{batch} {unit} at a time, {data.eval_batch_size} in validation",
        precision=precision,
        parallelism=parallelism,
        passes=tuple(passes),
    )


def _rto(module: RTOModule, data: PromptDataModule, precision: str, parallelism: Parallelism) -> Workload:
    settings, ppo, rollout = module.settings, module.ppo, module.rollout_settings
    of_all = data.batch_size * rollout.responses_per_prompt
    samples = parallelism.share(data.batch_size, "data.batch_size") * rollout.responses_per_prompt
    minibatch = parallelism.share(ppo.minibatch_size or of_all, "ppo.minibatch_size")
    held_out = data.eval_batch_size if data.sources["validation"] is not None else 0
    update_rows = min(ppo.microbatch_size, minibatch)
    scoring_rows = min(module.scoring_batch_size, max(samples, held_out))
    own_engine = rollout.engine == "vllm"
    keeps = not own_engine and reads_while_sampling(ppo.sampling_logprobs, settings, precision)
    roles, outside = roles_of(module), outside_models_of(module)
    rollouts = _rollouts(rollout, samples, held_out, keeps)
    sampled = max(part.rows for part in rollouts)
    at_a_time = f"{scoring_rows} scored, {update_rows} updated at a time"
    at_a_time = f"{at_a_time}, sampled by vLLM beside" if own_engine else f"{sampled} sampled, {at_a_time}"
    return Workload(
        stage=module.stage_name,
        backbone=settings,
        roles=roles,
        phases=(
            *(() if own_engine else (Phase("rollout", rollouts),)),
            Phase("scoring", _scoring(roles, outside, scoring_rows, keeps)),
            *_updates(roles, update_rows, ppo.entropy_coefficient != 0),
        ),
        prompt_tokens=data.max_prompt_tokens,
        response_tokens=rollout.max_new_tokens,
        batch=f"{samples} responses an iteration, {at_a_time}",
        precision=precision,
        samples=max(of_all, held_out),
        outside=outside,
        parallelism=parallelism,
        passes=rto_passes(module, roles, outside, samples, minibatch, scoring_rows, keeps),
    )


def _rollouts(settings: RolloutSettings, samples: int, held_out: int, keeps_logprobs: bool) -> tuple[Rollout, ...]:
    """One batch of training, whose neighbours share prompts, and one of validation if it has more prompts."""
    rows = min(settings.batch_size or samples, samples)
    group = settings.responses_per_prompt
    # A batch that does not start with a prompt's first response holds parts of two more prompts.
    prompts = rows // group if rows % group == 0 else min(rows, (rows - 2) // group + 2)
    training = Rollout("policy", rows, settings.max_new_tokens, keeps_logprobs, prompts if group > 1 else None)
    rows = min(settings.batch_size or held_out, held_out)
    if rows <= prompts:
        return (training,)
    return training, Rollout("policy", rows, settings.max_new_tokens, keeps_logprobs)


def _scoring(
    roles: tuple[RoleWeights, ...], outside: tuple[OutsideModel, ...], rows: int, keeps_logprobs: bool
) -> tuple[Forward, ...]:
    """The roles that are read, of those on one model only the one that takes the most memory."""
    kinds = {role.name: role.kind for role in roles}
    forwards = [] if keeps_logprobs else [Forward("policy", "logprobs and entropy", rows)]
    for role in roles:
        reading = scoring_reading(role)
        if reading is not None:
            forwards.append(Forward(role.name, reading, rows))
    heaviest: dict[str, Forward] = {}
    for forward in forwards:
        on_base = kinds[forward.role] != "model"
        key = "base" if on_base else forward.role
        other = heaviest.get(key)
        if other is None or _order(forward, kinds[forward.role]) > _order(other, kinds[other.role]):
            heaviest[key] = forward
    return (*heaviest.values(), *(Forward(model.source, "score", rows) for model in outside))


def _order(forward: Forward, kind: str) -> tuple[int, bool]:
    """Orders the readings of one model by the memory they take."""
    return ("score", "values", "logprobs", "logprobs and entropy").index(forward.reading), kind != "base"


def _updates(roles: tuple[RoleWeights, ...], rows: int, with_entropy: bool) -> tuple[Phase, ...]:
    """The update of the policy and that of the critic, which a shared critic makes one."""
    kinds = {role.name: role.kind for role in roles}
    reading: Reading = "logprobs and entropy" if with_entropy else "logprobs"
    trained: tuple[str, ...] = ("policy",)
    if kinds.get("critic") == "shared":
        reading, trained = "logprobs and values", ("policy", "critic")
    phases = [Phase("update of " + " and ".join(trained), (Forward("policy", reading, rows, True),), trained)]
    if kinds.get("critic", "shared") != "shared":
        phases.append(Phase("update of critic", (Forward("critic", "values", rows, True),), ("critic",)))
    return tuple(phases)
