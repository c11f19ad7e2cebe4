"""The whole configuration of a run, typed and frozen. Importable without torch.

The model's architecture is not here: it comes from the Hugging Face config.json under `model.path`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from megatron_rl.config.bounds import (
    AdamBeta,
    FilePath,
    Frozen,
    LearningRate,
    MebiBytes,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Reward,
    Seconds,
)
from megatron_rl.config.dynamic_sampling import DynamicSamplingConfig
from megatron_rl.config.lab import LabConfig, RlLabConfig
from megatron_rl.config.multi_turn import EnvironmentConfig
from megatron_rl.config.recompute import Recomputation, read_recompute
from megatron_rl.config.servers import ServersConfig
from megatron_rl.config.stress import NoStress, StressConfig
from megatron_rl.config.switches import ObjectiveConfig
from megatron_rl.models.kinds import POLICY_KINDS, PolicyKind


def _check_kinds(kinds: tuple[PolicyKind, ...]) -> tuple[PolicyKind, ...]:
    if len(set(kinds)) < len(kinds):
        raise PydanticCustomError("kinds", "each kind of weight once")
    return tuple(kind for kind in POLICY_KINDS if kind in kinds)  # their order means nothing: a resume may have another


def _check_recompute(text: str) -> str:
    try:
        read_recompute(text)
    except ValueError as error:
        raise PydanticCustomError("recompute", "{expected}", {"expected": str(error)}) from None
    return text


Recompute = Annotated[str, AfterValidator(_check_recompute)]
WeightKinds = Annotated[tuple[PolicyKind, ...], AfterValidator(_check_kinds)]

Device = Literal["auto", "cpu", "cuda"]
EngineDtype = Literal["fp32", "bf16"]


class ModelConfig(Frozen):
    path: FilePath
    """Hugging Face model directory: config.json, tokenizer and safetensors."""
    reference: FilePath | None = None
    """Model directory of the reference policy pi_ref, whose architecture must equal the policy's. Defaults to `path`;
    read only if objective.kl needs it."""


class ParallelConfig(Frozen):
    """Degrees of parallelism. Data parallelism is what is left of the world: world / (tp * pp * cp)."""

    tp: PositiveInt = 1
    """Tensor parallelism; sequence parallelism is on whenever it is above 1. It divides the attention heads, and is a
    divisor or a multiple of the key-value heads. --dry-run lists the sizes that fit."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    vpp: PositiveInt = 1
    """Virtual stages per pipeline stage (interleaved schedule)."""
    stage_layers: tuple[PositiveInt, ...] | None = None
    """Layers of each stage in the order of the model: pp numbers, or pp * vpp with virtual stages. Defaults to null:
    equally many, and what is left over one each to stages in the middle, as the first and the last have most to do."""
    cp: PositiveInt = 1
    """Context parallelism: each sequence in 2 * cp chunks, zigzag."""
    ep: PositiveInt = 1
    """Expert parallelism; takes its ranks from tp, cp and data parallelism."""
    etp: PositiveInt = 1
    """Tensor parallelism inside each expert."""


class EngineConfig(Frozen):
    device: Device = "auto"
    """Device of the trainer and of the servers that it starts. auto: cuda if there is a GPU, else cpu."""
    dtype: EngineDtype = "bf16"
    """Dtype of weights and activations."""
    grad_dtype: EngineDtype = "fp32"
    """Dtype in which gradients are added up over micro-batches and reduced over replicas. bf16 halves their memory and
    traffic, loses bits, and needs dtype bf16."""
    fp8: Literal["none", "tensorwise", "blockwise", "mxfp8"] = "none"
    """Dtype of the layers' matrix products with Transformer Engine: none: `dtype`; else fp8 e4m3 with a scale for each
    tensor (gradients e5m2), for each block of 128 x 128 or 1 x 128, or for each 32 numbers. Weights stay in `dtype`,
    which must be bf16."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """te: layers of Transformer Engine, in bf16 alone; torch: plain PyTorch. auto: te in bf16 on a GPU with Transformer
    Engine, else torch."""
    dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """Exchange of tokens between expert ranks: all-to-all, or DeepEP, which needs a GPU and ep or etp above 1."""
    cp_comm: Literal["p2p", "a2a"] = "p2p"
    """Exchange of attention under context parallelism with Transformer Engine's layers. p2p: keys and values go round a
    ring, during computation; a2a: heads are exchanged for tokens. Layers in plain PyTorch gather keys and values."""
    overlap: Literal["none", "grads", "all"] = "all"
    """Data-parallel communication that runs during computation. grads: gradients are reduced during the backward pass;
    all: also the new weights are gathered during the next forward pass. Results are the same."""
    recompute: Recompute = "none"
    """Activations that the backward pass computes again: none; full: every layer; full:N: the first N layers of each
    (virtual) stage; or modules of every layer, as `moe,layernorm`: core_attn, layernorm, mlp, moe, shared_experts, and
    with Transformer Engine moe_act and mla_up_proj."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, and slower ones for it. On a GPU set CUBLAS_WORKSPACE_CONFIG to
    :4096:8 for all ranks, and with Transformer Engine NVTE_ALLOW_NONDETERMINISTIC_ALGO to 0."""
    max_tokens_per_micro_batch: PositiveInt = 8192
    """Packed tokens of one micro-batch, over all context-parallel ranks. A longer sample has its own micro-batch."""
    logit_chunk_tokens: PositiveInt = 512
    """Tokens whose fp32 logits exist at a time in the backward pass. In the forward pass, which needs two tensors of
    this size, it is half as many."""
    aux_loss_coefficient: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Coefficient of Megatron-Core's load-balancing loss, for policy and critic. 0 disables it."""
    heartbeat: Annotated[float, Field(ge=1)] | None = 90.0
    """Seconds without a sign of life after which a rank is lost: stopped, or without its host. The other ranks then end
    and name it. Defaults to 90; null disables."""
    stall: Annotated[float, Field(ge=1)] | None = 900.0
    """Seconds in which nothing moves on any rank: no phase, answer, verdict, micro-batch or bucket of weights. All
    ranks then say which rank is in which phase, and which servers owe answers, and end. Set it above weights.timeout,
    whose errors say more. Defaults to 900; null disables."""

    @property
    def recomputation(self) -> Recomputation:
        return read_recompute(self.recompute)


class OptimConfig(Frozen):
    lr: LearningRate = 1e-6
    """Learning rate after the warm-up; linear and cosine decay from it."""
    min_lr: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Learning rate from decay_steps on; for linear and cosine only."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling from lr to min_lr."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps in which the learning rate rises from 0 to lr."""
    decay_steps: NonNegativeInt = 0
    """Optimizer steps until min_lr; needed by linear and cosine."""
    betas: tuple[AdamBeta, AdamBeta] = (0.9, 0.95)
    """Decay rates of Adam's first and second moments."""
    eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Number added to the root of Adam's second moment."""
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Decoupled weight decay, as in AdamW."""
    clip_grad: Annotated[float, Field(gt=0, le=1e12)] = 1.0
    """Global gradient norm above which gradients are scaled down."""
    moments_dtype: EngineDtype = "fp32"
    """Dtype of Adam's moments. bf16: the optimizer takes 6 bytes a weight in place of 12, and its moments lose bits. It
    needs a GPU, Transformer Engine and engine.dtype bf16."""
    offload: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the optimizer's fp32 weights and moments that is in the host's memory and stepped by its cores; 1: all.
    It needs a GPU, Transformer Engine and engine.dtype bf16."""
    freeze: WeightKinds = ()
    """Kinds of weights that do not train. embedding: word embeddings and output layer; attention: its projections, and
    its norms of query and key heads; other: all other norms, and dense MLPs. Empty: all train."""
    max_skipped: NonNegativeInt = 3
    """Optimizer steps of a run that may be skipped because a gradient was not finite; the next one ends the run."""


class CriticOptimConfig(OptimConfig):
    lr: LearningRate = 1e-5


class DataConfig(Frozen):
    train: str
    """JSONL, Parquet or Arrow file, a directory with the files of one split, a directory of save_to_disk,
    `arithmetic:SPEC` or `reasoning-gym:SPEC` (docs/data.md)."""
    heldout: str | None = None
    """Data set for evaluation, in any format of `train`. Defaults to null: no evaluation."""
    prompt_field: str = "prompt"
    """Field with the prompt."""
    answer_field: str = "answer"
    """Field with the reference answer. A verifier that takes the whole record needs none."""
    verifier: str | None = None
    """Verifier of prompts that name none: a built-in name, or `package.module:function`, which may lie in the working
    directory. A prompt may name a built-in verifier or this one. Defaults to the source's own if it is generated, else
    `math`."""
    chat_template: bool = False
    """Wrap each prompt as a user message with the tokenizer's chat template."""
    max_prompt_tokens: PositiveInt = 1024
    """A longer prompt is an error that names it."""


class RolloutConfig(Frozen):
    prompts_per_step: PositiveInt = 32
    """Over all data-parallel ranks; each leader fetches its own share."""
    group_size: PositiveInt = 8
    """Responses per prompt."""
    max_response_tokens: PositiveInt = 1024
    """Length limit of a response, in tokens. A longer response is truncated. Over several turns it bounds all that
    follows the prompt."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    """Sampling temperature. Trainer and servers compute log-probs from logits / temperature."""
    lag: Annotated[int, Field(ge=0, le=64)] = 0
    """Steps by which a rollout may begin before the one that trains on it: its tokens are at most as many weight
    versions older than pi_old. 0: a rollout begins after the weight sync; 1: it is sampled during the update before
    (one step off-policy). Above 0, servers put requests aside during a sync and go on with the new weights."""
    over_sampling: Annotated[float, Field(gt=1, le=65)] | None = None
    """Prompts in flight when a step begins, as a multiple of prompts_per_step; at most 1 + lag. The step takes the
    groups that are done first, and the rest goes on meanwhile (partial rollouts). A group is waited for if it would
    otherwise become older than the lag. null: a step takes its groups in the order of the prompts."""
    concurrency: PositiveInt = 256
    """Samples in flight per data-parallel leader."""
    deadline: Seconds = 1800.0
    """Seconds for one request, retries included, and without the time in which servers are paused."""
    replay_from: FilePath | None = None
    """Train on the rollouts saved in this run directory instead of asking servers."""
    dynamic_sampling: DynamicSamplingConfig | None = None
    """null: every group is trained on."""
    environment: EnvironmentConfig | None = None
    """null: a sample is one response to its prompt."""
    servers: ServersConfig = ServersConfig()


class RewardConfig(Frozen):
    """How verifiers run, and what becomes of their verdicts before they are rewards (docs/verifiers.md)."""

    workers: PositiveInt | None = None
    """Processes for each verifier on each data-parallel leader; null: one for each core, up to 16."""
    timeout: Positive = 10.0
    """Seconds for one call of a verifier, which judges one response, or all of a group if it asks for them."""
    memory_mib: PositiveInt | None = 4096
    """Address space of a worker; null: no limit."""
    environment: tuple[str, ...] = ()
    """Environment variables that verifiers see in addition to PATH, HOME and similar ones. An API key belongs here only
    if a verifier needs it."""
    correct: Reward | None = None
    """The reward of a right answer, in place of the verifier's own; null: the verifier's own."""
    wrong: Reward | None = None
    """The reward of a wrong answer; null: the verifier's own."""
    overlong_cache: PositiveInt | None = None
    """Tokens of DAPO's soft overlong punishment [2503.14476, equation 13]. Over this many last tokens before
    rollout.max_response_tokens the reward falls by up to 1; null: no punishment."""
    overlong_filter: bool = False
    """DAPO's overlong filtering: a truncated response is masked out of the loss and its denominators; its reward still
    counts in its group. With overlong_cache too, the punishment is felt by the responses that end in the cache."""


class CriticConfig(Frozen):
    """The value model of PPO, on the policy's engine and layout. Its mini-batches are the policy's."""

    path: FilePath | None = None
    """Hugging Face directory. A value head is read from `score.weight` if it exists. Defaults to null: model.path."""
    optim: CriticOptimConfig = CriticOptimConfig()
    clip: Positive | None = 0.2
    """Largest distance of a value from its value before the first update; null: no bound."""
    warmup_steps: NonNegativeInt = 0
    """Rollout steps at the start of a run in which the critic learns alone; all of them: the policy stays as it was."""
    epochs: PositiveInt = 1
    """Passes over the rollout batch in each step; the policy makes one."""


class RoutingConfig(Frozen):
    """Routing replay: which experts the trainer's tokens go to. Only the choice is replayed, not the scores."""

    replay: Literal["none", "r2", "r3"] = "none"
    """none: live routing; r2: the trainer's old-log-prob pass records, every update replays [GSPO 2507.18071, section
    5.3]; r3: the rollout engine's routes are replayed in the old-log-prob pass and every update [2510.11370]."""
    observe_rollout: bool = False
    """Ask the servers for their routes, for metrics, even if no routes are replayed."""
    noise_floor: NonNegativeInt = 0
    """Every N-th step the old-log-prob pass runs twice, and the routing metrics compare the two passes. This
    measures what differs without any update. 0: never."""

    @property
    def needs_rollout_routes(self) -> bool:
        return self.replay == "r3" or self.observe_rollout


class WeightsConfig(Frozen):
    route: Literal["collective", "disk", "delta", "ipc"] = "collective"
    """collective: buckets are broadcast over NCCL or gloo; disk: files in run_dir/weights, which all servers must see;
    delta: as disk the first time, then one file of the elements that changed; ipc: in memory of the GPUs that servers
    share under rollout.servers.colocate (docs/weights.md)."""
    bucket_mib: MebiBytes = 256
    """Size of one gathered and broadcast bucket of weights."""
    verify: NonNegativeInt = 0
    """Every N-th sync is verified against the servers; 0: the first alone, which always is."""
    verify_bound: Positive | None = None
    """Largest |log-prob difference| on the probe, and largest mean one on what a server samples; null: 1e-5 if
    engine and servers compute in fp32 on a CPU, else 0.1."""
    timeout: Seconds = 600.0
    """Seconds until the servers must answer each request of a weight sync."""
    stress: StressConfig = NoStress()
    """Widens the mismatch between servers and trainer: changes the weights that the servers get, and never the
    trainer's own (docs/stress.md)."""


class EvalConfig(Frozen):
    every: NonNegativeInt = 0
    """Rollout steps between evaluations. 0: only before the first step and after the last."""
    samples: PositiveInt = 1
    """Responses per held-out prompt: k of avg@k and pass@k."""
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Sampling temperature; 0 is greedy."""
    prompts: PositiveInt | None = None
    """Number of held-out prompts to use, from the first on. Defaults to null: all."""


class CheckpointConfig(Frozen):
    every: NonNegativeInt = 0
    """Rollout steps between checkpoints; for SFT, optimizer steps. Defaults to 0: `minutes` decides. There is always a
    checkpoint after the last step, and before a signal or max_minutes ends the run."""
    minutes: Positive | None = 30.0
    """Minutes after the last checkpoint. The first step that ends later is followed by a checkpoint. Defaults to 30;
    null disables."""
    keep: PositiveInt = 2
    """Number of checkpoints to keep; older ones are deleted."""


class TrainConfig(Frozen):
    steps: PositiveInt
    """Rollout steps; each makes `mini_batches` optimizer steps."""
    max_minutes: Positive | None = None
    """Minutes that the run may take. The next step is taken to be as long as the longest. If it would end too late, the
    run saves a checkpoint and ends with status 75. Leave time for the checkpoint. Defaults to null: no limit."""
    mini_batches: PositiveInt = 4
    """Optimizer steps per rollout step, each on an equal block of groups."""
    recompute_old_logprobs: bool = True
    """False: pi_old comes from the update's own forward pass. With several mini-batches, which need
    objective.denominator rollout, mu stands for pi_old."""


class Config(Frozen):
    presets: tuple[str, ...] = ()
    """Built-in presets by name, or YAML files relative to this one; later ones win, this file wins over all.

    Once loaded it is empty: what the presets set is merged in."""
    merged_presets: tuple[str, ...] = ()
    """Written by the loader: the presets that were merged in, theirs included, in order. The key merges nothing."""
    run_dir: FilePath
    """Directory of the run's metrics, rollouts, checkpoints and trained model. A non-empty one needs --resume."""
    seed: NonNegativeInt = 0
    """Seed of the order of prompts, of the ranks' random generators and of launched servers."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    critic: CriticConfig | None = None
    """Needed by objective.advantage.estimator gae."""
    train: TrainConfig
    routing: RoutingConfig = RoutingConfig()
    weights: WeightsConfig = WeightsConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    lab: RlLabConfig = RlLabConfig()


class SftDataConfig(Frozen):
    train: str
    """JSONL file or data set directory with prompt and response, or `arithmetic:SPEC`."""
    prompt_field: str = "prompt"
    """Field with the prompt."""
    response_field: str = "response"
    """Field with the response."""
    chat_template: bool = False
    """Wrap each prompt as a user message with the tokenizer's chat template."""
    max_tokens: PositiveInt = 4096
    """Length limit of prompt and response together, in tokens. A longer example is an error that names it."""


class SftConfig(Frozen):
    """Configuration of `megatron-rl sft`."""

    presets: tuple[str, ...] = ()
    """Built-in presets by name, or YAML files relative to this one, as for `megatron-rl train`."""
    merged_presets: tuple[str, ...] = ()
    """Written by the loader: the presets that were merged in, in order."""
    run_dir: FilePath
    """Directory of the run's metrics, checkpoints and trained model. A non-empty one needs --resume."""
    seed: NonNegativeInt = 0
    """Seed of the order of examples and of the ranks' random generators."""
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig = EngineConfig()
    optim: OptimConfig = OptimConfig()
    data: SftDataConfig
    steps: PositiveInt
    """Optimizer steps."""
    max_minutes: Positive | None = None
    """As train.max_minutes of RL. Defaults to null: no limit."""
    batch_size: PositiveInt = 64
    """Examples of one optimizer step, over all data-parallel ranks."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    lab: LabConfig = LabConfig()
