# SPDX-License-Identifier: MIT
"""GRPO for an LLM that learns to use a search engine, and LLDS, the penalty that keeps it from collapsing.

    python llds.py                                       a tiny built-in agent, offline, on a laptop's CPU
    python llds.py --model Qwen/Qwen2.5-0.5B-Instruct    the same code with a real model, on one GPU

GRPO samples a group of responses to each question, makes the tokens of better ones likelier and those of
worse ones less likely. Right responses close to a wrong one, down to the same search, are dragged along and
lose likelihood: lazy likelihood displacement. The model grows unsure; the less likely a wrong response, the
larger its gradient; the run collapses. LLDS adds lambda * max(0, old_logp - logp) on the tokens of responses
no worse than their group that have, as a whole, lost likelihood since they were sampled: 0 in a step's first
update. Paper: arXiv 2512.04220. N responses, T tokens, M of them in actions, D hidden units, V words."""
import copy, inspect, json, math, os, random, re, shutil, sys, time, warnings
from collections import Counter
from dataclasses import dataclass, field, fields
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states  # of models and optimizers, sharded or not
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, Cache, HfArgumentParser, PreTrainedTokenizerFast,
                          get_scheduler, set_seed)
from retriever import (BM25, CLOSE, CORRECTION, OPEN, PROMPT, ErringRetriever, HTTPRetriever, between, check,
                       clean, exact_match, information, lessons, load_corpus, load_questions, supplied,
                       tiny_agent)  # check, supplied: a user's mistake ends the program in one sentence

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp says so in a single process
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = "bfloat16" if GPU and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # of torchrun's processes
# ----------------------------------------------------------------------------------------------- settings
@dataclass
class Config:
    """Every flag, with its help. These defaults suit the built-in agent, those of REAL_MODEL a real model."""
    model: str = "tiny"  # 'tiny' (built in), a hub id, or a save_pretrained directory, such as runs/x
    corpus: str = ""  # passages to search, jsonl[.gz]; default: tiny_corpus.jsonl beside this file
    retriever_url: str = ""  # search there instead, in Search-R1's protocol: http://HOST:8000/retrieve
    train_data: str = ""  # questions to train on: SET[,SET...], see load_questions; default: --corpus
    eval_data: str = ""  # held-out questions, in the same form; each set is scored by itself
    retrieval_noise: float = 0.0  # chance that a search in training finds passages about something else
    hops: int = 0  # train and evaluate only on questions of so many hops; 0: on all
    output_dir: str = ""  # folder of a new run; default: runs/<model>-<time>
    seed: int = 0  # of the weights, the order of the questions and the sampling
    prompt: str = "{question}"  # for questions that bring no prompt of their own
    max_turns: int = 3  # turns in which a search is served; one more follows, for the answer
    top_k: int = 3  # passages a search returns
    max_new_tokens: int = 40  # tokens the model may write in a turn
    max_feedback_tokens: int = 120  # tokens of feedback; the text is cut, the block still closed
    steps: int = 40  # steps: each makes rollouts, then num_iterations * mini_batches updates
    questions_per_step: int = 16  # questions, and so groups, in a step
    group_size: int = 8  # rollouts of one question; their mean reward is the baseline
    mini_batches: int = 4  # parts of a step's rollouts; each makes one update in an iteration
    num_iterations: int = 1  # times that a step's rollouts are used for updates, as in TRL
    learning_rate: float = 5e-4  # of AdamW, constant after the warm-up
    warmup_ratio: float = 0.1  # share of the updates in which the learning rate rises from 0
    clip: float = 0.2  # how far a token's likelihood ratio, new to old, may move before its gradient stops
    beta: float = 0.0  # weight of the KL to the initial model, as in TRL
    freeze_embeddings: bool = False  # GRPO leaves the embeddings, and a head tied to them, as they are
    temperature: float = 1.0  # of sampling and of all log-probabilities; evaluation is greedy
    llds_lambda: list[float] = field(default_factory=lambda: [0.1])  # weight of LLDS; several: a run for each
    llds_gate: Literal["token", "response", "action"] = "response"  # what must have lost likelihood to pay
    answer_weight: str = "1"  # of the answer's tokens in the penalty (v2 eq. 5): 0 to 1, or 'adaptive'
    early_answers: float = 0.6  # share of scripted two-hop episodes that answer after one search
    warm_steps: int = 800  # supervised steps on scripted, imperfect episodes before GRPO
    warm_learning_rate: float = 4e-3  # of these steps, falling to 0
    rollout_batch: int = 256  # rollouts that share the KV cache at a time
    micro_batch_tokens: int = 2048  # padded tokens in one forward and backward pass
    dtype: Literal["float32", "bfloat16"] = DTYPE  # of matrix products; AdamW's weights are float32
    gradient_checkpointing: bool = GPU  # keep the layers' inputs, compute the rest again
    cpu_offload: bool = False  # weights, gradients and moments in the CPU's memory: 7B on one card
    save_steps: int = 10  # steps between two checkpoints
    resume: str = ""  # go on with the run in this folder, with its flags; those given here replace them
    eval_steps: int = 10  # steps between two evaluations on held-out questions
    plot: bool = False  # write curves.png (needs matplotlib)
    eval: bool = False  # evaluate --model on each set of --eval_data
    ask: str | None = None  # answer this question with --model
comments = dict(re.findall(r"^    (\w+):.*  # (.*)", inspect.getsource(Config), re.MULTILINE))
for entry in fields(Config):
    entry.metadata = {"help": comments[entry.name]}  # what --help prints
REAL_MODEL = dict(prompt=PROMPT, max_new_tokens=300, max_feedback_tokens=500, steps=200, group_size=5,
                  questions_per_step=32, mini_batches=8, learning_rate=1e-6, warmup_ratio=0.285, beta=0.001,
                  warm_learning_rate=1e-5, rollout_batch=80, micro_batch_tokens=16384, warm_steps=0)
LEAST = dict(group_size=2, max_feedback_tokens=32, temperature=1e-3, steps=0, warm_steps=0, hops=0, seed=0)

def parse_config(argv=None):
    """Command line -> Config. --model and --resume are read first: the other defaults depend on them."""
    parser = HfArgumentParser(Config, allow_abbrev=False)
    first = HfArgumentParser(Config, allow_abbrev=False, add_help=False).parse_known_args(argv)[0]
    defaults = {} if first.model == "tiny" else REAL_MODEL
    saved = Path(first.resume or first.model, "flags.json")  # of the run that wrote this folder
    if first.resume or saved.exists():
        with supplied(saved):
            defaults = vars(Config(**json.loads(saved.read_text())))
        defaults["warm_steps"] *= bool(first.resume)  # 0 for --model FOLDER: it is trained; kept for --resume
    parser.set_defaults(**defaults)
    cfg = Config(**vars(parser.parse_args(argv)))
    if cfg.resume:
        changed = {name: x for name, x in vars(cfg).items() if x != defaults[name] and name != "resume"}
        check(not {"model", "output_dir", "eval", "ask"} & changed.keys(),
              "--resume goes on with a run as it was: no --model, --output_dir, --eval or --ask beside it")
        pattern = "lambda_*/checkpoint-*" if len(cfg.llds_lambda) > 1 else "checkpoint-*"
        check(any(Path(cfg.resume).glob(pattern)), f"--resume {cfg.resume}: there is no {pattern}")
        print("flags that differ from the run's own:", changed)
    for name, value in (vars(cfg) | {"llds_lambda": min(cfg.llds_lambda)}).items():
        least = LEAST.get(name, int(type(value) is int))  # of other counts: 1; of other numbers: 0
        if isinstance(value, (int, float)):
            check(value >= least, f"--{name} must be at least {least}, not {value}")
    share = re.fullmatch(r"1(\.0*)?|0(\.\d*)?|\.\d+", cfg.answer_weight)
    check(share or cfg.answer_weight == "adaptive", "--answer_weight must be from 0 to 1, or 'adaptive'")
    check(cfg.mini_batches <= cfg.questions_per_step, "--mini_batches is more than --questions_per_step")
    check(not cfg.plot or find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
    check(cfg.ask is None or cfg.ask.strip() and cfg.model != "tiny", "--ask: question and trained --model")
    check("{question}" in cfg.prompt, "--prompt must contain {question}")
    if any(cfg.llds_lambda) and cfg.mini_batches * cfg.num_iterations == 1:
        print("WARNING: with one update a step (--mini_batches, --num_iterations) LLDS is 0", file=sys.stderr)
    return cfg

# ------------------------------------------------------------- episode: prompt, actions, feedback, reward
@dataclass
class Episode:
    """A question and all that followed. ids are exact: what was sampled is never decoded and re-encoded."""
    question: dict                                 # "question", "golden_answers", perhaps "prompt", "hops"
    ids: list                                      # prompt ...   action 1 ...   feedback ...   action 2 ...
    action_id: list                                # 0 0 0 0 0    1 1 1 1 1 1    0 0 0 0 0 0    2 2 2 2 2 2
    start: int                                     # where the current action begins in ids
    turn: int = 1
    searches: list = field(default_factory=list)   # of each served search: what it found (see respond)
    answer_start: int | None = None                # ids[answer_start:] is the answer, tags included
    reward: float = 0.0
    done: bool = False
    read: int = field(default=0, compare=False)    # ids[:read] are in the KV cache, see feed and rollout

class Environment:
    """Where text and ids meet. A new tool needs its closing tag in complete(), its feedback in respond()."""
    def __init__(self, tok, retriever, cfg, max_length=math.inf):
        self.tok, self.retriever, self.cfg, self.max_length = tok, retriever, cfg, max_length
        tok.clean_up_tokenization_spaces = False  # decode() shall give all that was written
        self.eos_ids = {tok.eos_token_id}  # each of them ends an action; main() adds the model's own
        special = [re.escape(token.content) for token in tok.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(special) or "(?!)")  # never from outside; (?!) matches nothing

    def encode(self, text):
        return self.tok.encode(text, add_special_tokens=False)

    def reset(self, question):
        """A new Episode, ready for its first action."""
        words = self.cfg.prompt.replace("{question}", question["question"])
        messages = question.get("prompt") or [{"role": "user", "content": words}]
        messages = [dict(message, content=clean(message["content"], self.special)) for message in messages]
        text = "\n".join(message["content"] for message in messages)
        if self.tok.chat_template:  # it writes the special tokens itself
            text = self.tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = self.tok.encode(text, add_special_tokens=not self.tok.chat_template)
        if ids[-1] in self.eos_ids:  # some tokenizers end each text
            ids.pop()
        return Episode(question, ids, action_id=[0] * len(ids), start=len(ids))

    def complete(self, e):
        """Is the current action complete: by an end of text, for want of room, or by a closing tag?"""
        action = e.ids[e.start:]
        full = len(action) >= self.cfg.max_new_tokens or len(e.ids) >= self.max_length
        tail = self.tok.decode(action[-9:])  # 9 tokens hold a tag, even one spelled by letters
        return full or e.ids[-1] in self.eos_ids or "</search>" in tail or "</answer>" in tail

    def respond(self, episodes):
        """Runs the action that each episode has just completed: ends the episode, or appends feedback."""
        searching, queries = [], []
        for e in episodes:
            text = self.tok.decode(e.ids[e.start:])
            answer, query = between("answer", text), between("search", text)
            if answer is not None:
                e.done = True
                e.reward = exact_match(answer, e.question["golden_answers"])
                e.answer_start = len(e.ids) - 1
                while "<answer>" not in self.tok.decode(e.ids[e.answer_start:]):
                    e.answer_start -= 1  # back to the token with which the tag begins
            elif e.turn > self.cfg.max_turns:
                e.done = True
            elif query is not None:
                searching.append(e)
                queries.append(query)
            else:
                self.append(e, self.encode(CORRECTION)[:self.cfg.max_feedback_tokens])
        found = self.retriever.search(queries, self.cfg.top_k)  # all in one request
        head, tail = self.encode(OPEN), self.encode(CLOSE)
        room = self.cfg.max_feedback_tokens - len(head) - len(tail)  # at least 32, see LEAST: room for both
        for e, passages in zip(searching, found):
            text = self.encode(clean(information(passages), self.special))
            self.append(e, head + text[:room] + tail)
            if not e.done:  # A search that erred, see ErringRetriever, counts as what it would have found.
                e.searches.append([passage.get("instead_of", passage["contents"]) for passage in passages])

    def append(self, e, feedback):
        """Adds feedback and opens the next turn; ends the episode instead if its context is full."""
        e.done = len(e.ids) + len(feedback) >= self.max_length
        if not e.done:
            e.ids += feedback
            e.action_id += [0] * len(feedback)
            e.start, e.turn = len(e.ids), e.turn + 1

# ------------------------------------------------------------------------------ several GPUs: torchrun, FSDP2
# A process for each GPU plays a share of the groups and computes a share of each micro-batch. Each keeps a
# part of every layer's weights, gradients and moments; FSDP2 gathers a layer's weights, in cfg.dtype, where
# they are used. With --cpu_offload the parts are in the CPU's memory, also if there is but one process.
def start_processes(cfg):
    """Joins the other processes, or makes a group of one for --cpu_offload. Only rank 0 prints to stdout."""
    if WORLD > 1 or cfg.cpu_offload:
        backend, store = "cpu:gloo,cuda:nccl" if GPU else "gloo", None if WORLD > 1 else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD)
    if GPU:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if RANK > 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8", errors="replace")

def everyone(x):
    """[x of rank 0, x of rank 1, ...], on every rank."""
    parts = [x] * WORLD
    if WORLD > 1:
        dist.all_gather_object(parts, x)
    return parts

def write(path, content):  # as JSON
    if RANK == 0:
        path.write_text(json.dumps(content, indent=1) + "\n")

def shard(model, cfg):
    """FSDP2. A rollout's first pass gathers all weights, which stay until a backward pass: nobody waits."""
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, cfg.dtype), reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=False) if cfg.cpu_offload else OffloadPolicy()
    mesh = dist.init_device_mesh(DEVICE, (WORLD,))
    for part in [*model.base_model.layers, model]:
        fully_shard(part, mesh=mesh, reshard_after_forward=False, mp_policy=policy, offload_policy=offload)
    # FSDP2 gathers the weights of embedding and head when `model` is called. We call its body, then its head:
    # so let model() be a call of its body. base_model is getattr(model, prefix, model): now the model itself.
    model.forward, model.base_model_prefix = model.base_model.forward, ""
    return model

def shares(micro_batches, action_id):
    """Yields this rank's rows of each micro-batch and their action_id."""
    for rows in micro_batches:  # all ranks must make equally many passes: a row without actions, if no other
        mine = rows[RANK::WORLD]
        some = mine if len(mine) > 0 else rows[:1]
        yield some, action_id[some] * (len(mine) > 0)

# ------------------------------------------------------------------------------------------------ rollout
# One KV cache serves all rollouts, and a token's cell in it is the token's position:
#     cell     0 1 2 3 4 5 6 7 8 9        P prompt, A action, F feedback, . nothing yet
#     row 0    P P P P A A F F A .        So nothing moves as rows grow, the mask is "cell <= own position",
#     row 1    P P P P A A A A . .        and a token that is fed a second time only rewrites its own cell.
class SlotCache(Cache):
    """Keys and values of all rows: for each layer two buffers, (rows, heads, cells, size)."""
    def __init__(self, rows, cells):
        super().__init__(layers=[])
        self.rows, self.cells, self.buffers = rows, cells, {}

    def begin_pass(self, rows, position, used):
        """Before a pass in which rows[i] writes cells position[i] and sees those below `used`. Its mask."""
        self.used, self.target = used, (torch.tensor(rows, device=DEVICE)[:, None], position)  # row, cell
        self.source = slice(len(rows)) if rows == [*range(len(rows))] else rows  # a slice needs no copy
        return torch.arange(used, device=DEVICE) <= position[:, None, :, None]  # (rows, 1, width, used)

    def update(self, keys, values, layer, *args, **kwargs):
        """What a layer calls: stores the new keys and values, returns all that these rows may look at."""
        new = keys.to(values.dtype), values  # under autocast the rotary embedding makes keys float32
        if layer not in self.buffers:  # zeros, not empty: 0 * NaN is NaN
            _, heads, _, size = keys.shape
            self.buffers[layer] = values.new_zeros(2, self.rows, heads, self.cells, size)
        for buffer, x in zip(self.buffers[layer], new):
            buffer.transpose(1, 2)[self.target] = x.transpose(1, 2)  # a view: (rows, cells, heads, size)
        return self.buffers[layer][:, self.source, :, :self.used]

def feed(model, cache, live):
    """One pass: the episodes of {row: episode} read their new ids, or the last again -> logits, (rows, V)."""
    ids, position = [], []
    width = max(1, max(len(e.ids) - e.read for e in live.values()))
    for e in live.values():
        last = len(e.ids) - 1
        start = min(e.read, last)
        position.append([min(t, last) for t in range(start, start + width)])  # a shorter row repeats its last
        ids.append([e.ids[t] for t in position[-1]])
        e.read = len(e.ids)  # true once this pass is over
    ids, position = torch.tensor([ids, position], device=DEVICE)                        # (rows, width) each
    mask = cache.begin_pass([*live], position, max(e.read for e in live.values()))  # (rows, 1, width, used)
    hidden = model.base_model(ids, mask, position, cache, use_cache=True)[0]            # (rows, width, D)
    return model.get_output_embeddings()(hidden[:, -1]).float()

@torch.no_grad()
def rollout(model, env, questions, group_size=1, temperature=1.0):
    """Plays group_size Episodes of each question; returns them, a group's side by side. A round feeds every
    row its newest token and samples the next. A row whose action is complete waits: its last token is fed
    again, the sample dropped. Once an eighth of the rows wait, they all get feedback, read in one pass."""
    model.eval()  # in train mode checkpointed layers would drop the cache
    torch.set_autocast_cache_enabled(True)  # weights that learn are cast once, not once a token
    cfg = env.cfg
    mine = questions[RANK::WORLD] or questions[:1]  # all ranks must play: the first pass gathers together
    episodes = [env.reset(question) for question in mine for _ in range(group_size)]
    prompt = max(len(e.ids) for e in episodes)
    longest = prompt + (cfg.max_turns + 1) * cfg.max_new_tokens + cfg.max_turns * cfg.max_feedback_tokens
    rows = min(cfg.rollout_batch, len(episodes))
    cache = SlotCache(rows, min(longest, env.max_length))
    queue, live, waiting = episodes, [], []  # live[r]: the episode in row r; waiting: rows that wait
    while queue or live:
        # 1. Free rows are taken. Prompts and feedback are read.
        live, queue = live + queue[:rows - len(live)], queue[rows - len(live):]
        unread = {r: e for r, e in enumerate(live) if len(e.ids) - e.read > 1}
        if unread:
            feed(model, cache, unread)  # step 2 feeds the last token again, with all rows, and samples
        # 2. A token for every row that does not wait.
        logits = feed(model, cache, dict(enumerate(live)))                              # (rows, V)
        if temperature > 0:
            tokens = (logits / temperature).softmax(dim=1).multinomial(1).flatten()
        else:
            tokens = logits.argmax(dim=1)
        for r, (e, token) in enumerate(zip(live, tokens.tolist())):
            if r not in waiting:
                e.ids.append(token)
                e.action_id.append(e.turn)
                if env.complete(e):
                    waiting.append(r)
        # 3. An eighth of the rows wait: run their actions. The last row takes the place of one that is done.
        if 8 * len(waiting) >= len(live):
            env.respond([live[r] for r in waiting])
            for r in sorted(waiting, reverse=True):  # from the end: no row after r is done any more
                if live[r].done:
                    live[r] = live[-1]
                    for buffer in cache.buffers.values():
                        buffer[:, r] = buffer[:, len(live) - 1]
                    live.pop()
            waiting = []
    torch.set_autocast_cache_enabled(False)
    torch.clear_autocast_cache()  # the weights will change
    played = [iter(part) for part in everyone(episodes)]
    return [next(played[i % WORLD]) for i in range(len(questions)) for _ in range(group_size)]

# ------------------------------------------------------ losses: they need torch alone; copy from here ...
def group_advantages(rewards, group_size):
    """How much better than its group a response is: A = (r - mean) / (std + 1e-6) (v2 eq. 1; sample std and
    1e-6 as in the official code). rewards: (N,), a group's side by side. Returns (N,)."""
    groups = rewards.float().view(-1, group_size)                               # (N / group_size, group_size)
    std, mean = torch.std_mean(groups, dim=1, keepdim=True)
    # Equal rewards give exactly 0: a rounded mean could make A slightly negative, and LLDS skip the group.
    low, high = groups.aminmax(dim=1, keepdim=True)
    return torch.where(low < high, (groups - mean) / (std + 1e-6), 0.0).view(-1)

def action_ids(mask):
    """Numbers the actions in a 0/1 mask, for other trainers; (N, T): [0, 1, 1, 0, 1] -> [0, 1, 1, 0, 2]."""
    mask = mask.long()
    begins = mask.diff(dim=1, prepend=mask.new_zeros(len(mask), 1)) == 1
    return begins.cumsum(dim=1) * mask

def masked_mean(x, mask, denom=None):
    """Mean of x where mask is 1, (N, T) both; denom replaces mask.sum(), so that micro-batches add up."""
    return (x * mask).sum() / max(1, mask.sum() if denom is None else denom)


def policy_loss(logp, old_logp, advantages, mask, clip=0.2, denom=None):
    """GRPO with masked feedback: the clipped objective (v2 eq. 1), token mean like the official code.
    logp, old_logp, mask: (N, T); advantages: (N,), else RuntimeError. Returns (loss, info: a count)."""
    mask, advantages = mask.bool(), advantages.view(len(logp), 1)
    # Masked before exp: what is there may be inf. Clamped, as in verl: exp(89) is inf.
    ratio = (logp - old_logp.detach()).masked_fill(~mask, 0).clamp(max=20).exp()        # (N, T)
    free = ratio * advantages
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages  # min: beyond clip, no gradient further that way
    return -masked_mean(torch.min(free, clipped), mask, denom), {"clipped": (clipped < free).sum()}  # tokens

def kl_penalty(logp, ref_logp, mask, denom=None):
    """KL to the initial model, token mean, by the estimate k3 = exp(r) - r - 1, r = ref_logp - logp."""
    r = (ref_logp.detach() - logp).masked_fill(~mask.bool(), 0).clamp(max=20)           # (N, T)
    return masked_mean(r.exp() - r - 1, mask, denom)
def llds_penalty(logp, old_logp, advantages, action_id, gate="response", answer_mask=None, answer_weight=1.0,
                 denom=None):
    """What good responses have lost in likelihood since they were sampled (v1; v2 eq. 4, 5, 9, 10): the mean
    over their action tokens of gate * answer_weight * max(0, old_logp - logp).
    >>> old_logp = torch.tensor([[-4., -4., -4.]])                     # a right response of three tokens
    >>> advantages, action_id = torch.tensor([1.]), torch.tensor([[1, 1, 1]])
    >>> fallen = torch.tensor([[-7., -4., -3.]])                       # lost 3, kept, gained 1: fell by 2
    >>> llds_penalty(fallen, old_logp, advantages, action_id)[0]       # the gate is open: (3 + 0 + 0) / 3
    tensor(1.)
    >>> risen = torch.tensor([[-7., -4., 0.]])                         # lost 3, kept, gained 4: rose by 1
    >>> llds_penalty(risen, old_logp, advantages, action_id)[0]        # the gate is closed
    tensor(0.)

    logp, old_logp: (N, T), of the present policy and of the one that sampled. advantages: (N,); good is >= 0,
        no worse than its group, even if all is wrong. action_id: (N, T), k on the k-th action's tokens, or 0.
    gate: 1 for the tokens of a unit whose log-likelihood has fallen, else 0. The unit is the "token"
        (v2 eq. 9), the "response" (v1; v2 eq. 10) or the "action" (v2 eq. 4).
    answer_mask: (N, T), the final answer's tokens; answer_weight in [0, 1] multiplies their penalty, but the
        gate sees them in full (LLDS-MA, with masked answer: 0 in v1, any weight in v2 eq. 5).
    Returns (loss, info: counts). ValueError: gate or answer_weight; RuntimeError: shape of advantages."""
    units = {"token": torch.arange(logp.shape[1], device=logp.device).expand_as(action_id),
             "response": torch.zeros_like(action_id),
             "action": action_id}  # to which unit of its row a token belongs, (N, T) each
    if gate not in units:
        raise ValueError(f"gate must be 'token', 'response' or 'action', not {gate!r}")
    if not 0 <= answer_weight <= 1:
        raise ValueError("answer_weight must be in [0, 1]")
    preserved = (action_id > 0) & (advantages.view(len(logp), 1) >= 0)                  # (N, T)
    lost = (old_logp.detach() - logp).masked_fill(~preserved, 0)                        # (N, T)
    unit = units[gate]
    zeros = torch.zeros(len(logp), unit.max() + 1, device=logp.device)                  # (N, units of a row)
    fallen = zeros.scatter_add(1, unit, lost.detach().float()) > 0  # the gate: a unit's sum; no gradient
    exists = zeros.scatter_add(1, unit, preserved.float()) > 0  # for the metrics: units with a good token
    penalty = torch.relu(lost) * fallen.gather(1, unit)  # relu: at 0 its gradient is 0, clamp's may be 1
    if answer_weight != 1:
        penalty = penalty * torch.where(answer_mask.bool(), answer_weight, 1.0)
    return masked_mean(penalty, preserved, denom), {"units": exists.sum(), "open_units": fallen.sum()}

# ------------------------------------------------------------------------------- ... copy to here. Update
def collate(episodes, group_size):
    """Episodes as tensors: ids, action_id, answer_mask: (N, T); rewards, advantages, action_tokens: (N,)."""
    ids = pad_sequence([torch.tensor(e.ids) for e in episodes], batch_first=True).to(DEVICE)
    action_id = pad_sequence([torch.tensor(e.action_id) for e in episodes], batch_first=True).to(DEVICE)
    answers = [torch.arange(len(e.ids)) >= (e.answer_start or len(e.ids)) for e in episodes]
    answer_mask = pad_sequence(answers, batch_first=True).to(DEVICE)
    rewards = torch.tensor([e.reward for e in episodes], device=DEVICE)
    return SimpleNamespace(ids=ids, action_id=action_id, answer_mask=answer_mask, rewards=rewards,
                           advantages=group_advantages(rewards, group_size),
                           action_tokens=(action_id > 0).sum(dim=1))

def token_logps(model, ids, action_id, temperature=1.0, chunk=256):
    """Log-probability of each action token under the tempered distribution that sampled it, and its entropy:
    (N, T) float32 each, in nats, 0 outside actions. ids, action_id: (N, T), right-padded. Only hidden states
    that predict an action token meet the LM head, `chunk` at a time: (N, T, V) logits never exist."""
    model.train(torch.is_grad_enabled())  # gradient checkpointing, if on, acts in train mode; dropout is off
    # The one shift: the hidden state of column t predicts the token of column t + 1.
    row, column = (action_id[:, 1:] > 0).nonzero(as_tuple=True)                         # (M,) each
    needed = max(column.tolist(), default=0) + 1  # columns up to the last that predicts an action token
    hidden = model.base_model(input_ids=ids[:, :needed], use_cache=False)[0]  # right padding: no mask
    hidden, target = hidden[row, column], ids[row, column + 1]                          # (M, D), (M,)
    def head(hidden, target):
        logits = model.get_output_embeddings()(hidden).float()                          # (chunk, V)
        logp = (logits / temperature).log_softmax(dim=-1)
        entropy = -(logp.exp() * logp).detach().sum(dim=-1)
        return torch.stack([logp.gather(1, target[:, None])[:, 0], entropy])            # (2, chunk)
    parts = [checkpoint(head, *x, use_reentrant=False) for x in zip(hidden.split(chunk), target.split(chunk))]
    both = torch.zeros(2, *ids.shape, device=ids.device)                                # (2, N, T)
    both[:, row, column + 1] = torch.cat(parts, dim=1)                                  # (2, M)
    return both

@torch.no_grad()
def all_logps(model, batch, micro_batches, temperature):
    """token_logps in the updates' own micro-batches: in others it rounds otherwise, and gates would open."""
    both = torch.zeros(2, *batch.ids.shape, device=DEVICE)                              # (2, N, T)
    for rows, action_id in shares(micro_batches, batch.action_id):
        both[:, rows] = token_logps(model, batch.ids[rows], action_id, temperature)
    if WORLD > 1:
        dist.all_reduce(both)
    return both

def split(episodes, group_size, mini_batches, max_tokens):
    """Yields mini-batches of shuffled groups: tuples of micro-batches, row numbers, max_tokens at most."""
    lengths = torch.tensor([len(e.ids) for e in episodes])
    for groups in torch.randperm(len(lengths) // group_size).tensor_split(mini_batches):
        rows = (groups[:, None] * group_size + torch.arange(group_size)).flatten()
        rows = rows[lengths[rows].argsort()]  # rows of similar length need little padding
        yield rows.split(max(1, max_tokens // int(lengths[rows[-1]])) * WORLD)  # rows[-1]: the longest

def adamw(model, rate, cfg, betas=(0.9, 0.999)):
    model.state_dict()  # FSDP2 gives back what it gathered: parameters() are this process' parts again
    return torch.optim.AdamW(model.parameters(), rate, betas, weight_decay=0, fused=GPU or cfg.cpu_offload)

def optimizer_step(learner):
    """One step, the gradient cut to norm 1; none if it is not finite. Returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(learner.model.parameters(), max_norm=1.0)
    norm = (norm.full_tensor() if dist.is_initialized() else norm).item()
    if math.isfinite(norm):
        learner.optimizer.step()
    learner.scheduler.step()
    learner.model.zero_grad()
    return norm

def update(learner, batch, mini_batch, answer_weight, cfg):
    """One update: GRPO + lambda * LLDS (+ beta * KL) on a mini-batch (v2 eq. 6). Returns its metrics."""
    members = torch.cat(mini_batch)
    # The two normalisers are those of the whole mini-batch, so its micro-batches add up to its mean.
    lengths = batch.action_tokens[members]                                              # (rows,)
    action_tokens, preserved_tokens = lengths.sum(), lengths[batch.advantages[members] >= 0].sum()
    own, total = Counter(), Counter()  # of this process, of all; a Counter's update() adds
    for rows, action_id in shares(mini_batch, batch.action_id):
        advantages, old_logp = batch.advantages[rows], batch.old_logp[rows]
        logp, _ = token_logps(learner.model, batch.ids[rows], action_id, cfg.temperature)
        policy, info = policy_loss(logp, old_logp, advantages, action_id > 0, cfg.clip, action_tokens)
        llds, counts = llds_penalty(logp, old_logp, advantages, action_id, cfg.llds_gate,
                                    batch.answer_mask[rows], answer_weight, preserved_tokens)
        loss = policy + learner.llds_lambda * llds  # the whole method
        if cfg.beta:
            info["kl"] = kl_penalty(logp, batch.ref_logp[rows], action_id > 0, action_tokens)
            loss = loss + cfg.beta * info["kl"]
        (loss * WORLD).backward()  # FSDP2 takes the mean over the processes
        own.update({name: x.item() for name, x in {"llds": llds, **info, **counts}.items()})
    for part in everyone(own):
        total.update(part)
    return {"grad_norm": optimizer_step(learner), "llds": total["llds"], "kl": total["kl"],
            "clip_frac": total["clipped"] / action_tokens.item(),
            "llds_gate_frac": total["open_units"] / max(1, total["units"])}

def train_step(learner, episodes, cfg):
    """A step after its rollouts: advantages, old log-probabilities, updates. Returns (metrics, batch)."""
    model, batch = learner.model, collate(episodes, cfg.group_size)
    mini_batches = everyone([*split(episodes, cfg.group_size, cfg.mini_batches, cfg.micro_batch_tokens)])[0]
    micro_batches = sum(mini_batches, ())  # of rank 0, see above: each rank would shuffle otherwise
    batch.old_logp, batch.entropy = all_logps(model, batch, micro_batches, cfg.temperature)
    if cfg.beta:  # no second model for the reference: ours takes the initial weights for a moment
        now = copy.deepcopy(model.state_dict())  # there is room for it as long as there are no gradients
        model.load_state_dict(learner.start)
        batch.ref_logp, _ = all_logps(model, batch, micro_batches, cfg.temperature)
        model.load_state_dict(now)
        del now
    metrics = rollout_metrics(episodes, batch, cfg)
    adaptive = min(metrics["searches"] / 2, 1.0)  # v2: grows with the step's mean searches, 1 from two on
    metrics["answer_weight"] = adaptive if cfg.answer_weight == "adaptive" else float(cfg.answer_weight)
    updates = [update(learner, batch, mini_batch, metrics["answer_weight"], cfg)
               for mini_batch in mini_batches * cfg.num_iterations]
    for name in updates[0]:
        metrics[name] = mean([info[name] for info in updates])
    # Share of right responses that the updates made less likely, by 0.001 nats: less may be rounding.
    right = batch.rewards.cpu() == 1                                                    # (N,)
    rows_of_right = [rows[right[rows]] for rows in micro_batches if right[rows].any()]
    new_logp, _ = all_logps(model, batch, rows_of_right, cfg.temperature)
    metrics["displaced"] = mean((new_logp - batch.old_logp)[right].sum(dim=1) < -1e-3)
    return metrics, batch

def mean(values):
    value = torch.as_tensor(values, dtype=torch.float64).mean().item()
    return value if math.isfinite(value) else None  # in JSON null: no values, or one that is not finite

def rollout_metrics(episodes, batch, cfg):
    """What a step's rollouts were like: {name: number}."""
    is_action = batch.action_id > 0                                                     # (N, T)
    right = (batch.rewards == 1)[:, None]                                               # (N, 1)
    searches = torch.tensor([[len(e.searches)] for e in episodes], device=DEVICE)       # (N, 1)
    metrics = {"reward": mean(batch.rewards), "searches": mean(searches),
               "first_action_match": first_action_match(episodes, cfg.group_size),
               "entropy": mean(batch.entropy[is_action]), "action_tokens": mean(batch.action_tokens),
               "zero_std_groups": mean((batch.advantages == 0).view(-1, cfg.group_size).all(dim=1))}
    parts = {"logp_correct": right, "logp_wrong": ~right}
    parts |= {f"logp_action{k}": right & (batch.action_id == k) for k in (1, 2)}
    parts |= {f"logp_{n}searches": searches == n for n in range(cfg.max_turns + 1)}
    for name, part in parts.items():
        metrics[name] = mean(batch.old_logp[is_action & part])
    return metrics

def first_action_match(episodes, group_size):
    """Share of wrong responses, in groups with right ones, whose first search found the same (v2 fig. 5)."""
    matches = []
    for i in range(0, len(episodes), group_size):
        group = episodes[i:i + group_size]
        found = [e.searches[:1] for e in group if e.reward]
        wrong = [e.searches[:1] for e in group if found and not e.reward]
        matches += [first in found and any(first) for first in wrong]  # any: it searched and found some
    return mean(matches)

def evaluate(model, env, questions):
    """Greedy episodes -> exact match and searches a question: of all, by set, and the mean of the sets."""
    parts = {"": rollout(model, env, questions, temperature=0.0)}
    for e in parts[""]:
        if e.question.get("set"):
            parts.setdefault("_" + e.question["set"], []).append(e)
    scores = {}
    for part, episodes in sorted(parts.items()):
        scores["eval_em" + part] = mean([e.reward for e in episodes])
        scores["eval_searches" + part] = mean([len(e.searches) for e in episodes])
    if len(parts) > 2:
        scores["eval_em_average"] = mean([scores["eval_em" + part] for part in parts if part])
    return scores

# --------------------------------------------------------------------------------------------------- train
def start_run(model, start, llds_lambda, cfg):
    """A learner: what training changes and a checkpoint keeps. start: initial weights, if not these."""
    model.load_state_dict(start or model.state_dict())  # its own: no change
    optimizer = adamw(model, cfg.learning_rate, cfg)
    model.get_input_embeddings().requires_grad_(not cfg.freeze_embeddings)
    warm_up = int(cfg.warmup_ratio * cfg.steps * cfg.num_iterations * cfg.mini_batches)
    scheduler = get_scheduler("constant_with_warmup", optimizer, warm_up)
    return SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler, start=start,
                           llds_lambda=llds_lambda, history=[])

def train(learner, noisy_env, env, questions, held_out, out, cfg):
    """The algorithm: cfg.steps times rollouts in noisy_env, then updates. All is kept in the folder `out`."""
    load_checkpoint(out, learner)
    order, shuffle = [], random.Random(cfg.seed)
    while len(order) < cfg.steps * cfg.questions_per_step:  # every question once, then all again
        order += shuffle.sample(questions, len(questions))
    for step in range(len(learner.history) + 1, cfg.steps + 1):
        torch.manual_seed(hash((cfg.seed, step)) + RANK)  # so a resumed run draws the same numbers
        began = time.perf_counter()
        asked = order[(step - 1) * cfg.questions_per_step:step * cfg.questions_per_step]
        episodes = rollout(learner.model, noisy_env, asked, cfg.group_size, cfg.temperature)
        metrics, _ = train_step(learner, episodes, cfg)
        learner.history.append({"step": step, **metrics, "seconds": time.perf_counter() - began})
        last = step == cfg.steps
        if last or step % cfg.eval_steps == 0:
            show(env, episodes[0], with_prompt=step == cfg.eval_steps)
            learner.history[-1].update(evaluate(learner.model, env, held_out))
        log_step(out, learner.history)
        if last or step % cfg.save_steps == 0:
            save_checkpoint(out, learner)
    whole = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = states.get_model_state_dict(learner.model, options=whole)
    if RANK == 0:
        learner.model.save_pretrained(out, state_dict=weights)
        env.tok.save_pretrained(out)

STEP_LINE = "reward logp_correct logp_wrong entropy displaced grad_norm llds searches seconds eval_em".split()
def log_step(out, history):
    """Writes metrics.jsonl, and prints the last step."""
    row = history[-1]
    if RANK == 0:
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, history)) + "\n")
    shown = [f" {name} {row[name]:6.3f}" for name in STEP_LINE if row.get(name) is not None]
    print(f"step {row['step']:4}", *shown, flush=True)

def save_checkpoint(out, learner):
    """Writes all that a resumed run needs. It gets its name once it is complete; then older ones go."""
    older, unfinished = list(out.glob("checkpoint-*[0-9]")), out / "unfinished"
    weights, moments = states.get_state_dict(learner.model, learner.optimizer)
    writer = dcp.FileSystemWriter(unfinished, per_thread_copy_ahead=0)  # in turn, without CUDA streams
    dcp.save({"weights": weights, "moments": moments}, storage_writer=writer, no_dist=WORLD == 1)
    write(unfinished / "rest.json", {"scheduler": learner.scheduler.state_dict(), "history": learner.history})
    if RANK == 0:
        unfinished.rename(out / f"checkpoint-{len(learner.history)}")
        for folder in older:
            shutil.rmtree(folder)

def load_checkpoint(out, learner):
    """Takes up the last checkpoint in out, if there is one, written by any number of processes."""
    complete = sorted(out.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    for folder in complete[-1:]:
        with supplied(folder, (Exception, dcp.CheckpointException)):
            model, optimizer = learner.model, learner.optimizer
            weights, moments = states.get_state_dict(model, optimizer)  # of the right shapes, to be filled
            dcp.load({"weights": weights, "moments": moments}, checkpoint_id=folder, no_dist=WORLD == 1)
            states.set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
            rest = json.loads((folder / "rest.json").read_text())
            del rest["scheduler"]["base_lrs"]  # another --learning_rate holds from the second update on
            learner.scheduler.load_state_dict(rest["scheduler"])
            learner.history = rest["history"]

def show(env, e, with_prompt=False):
    """An episode by its loss mask: trained is bright, the answer green or red, the rest dim or in [[ ]]."""
    colours = [1 if k else 2 for k in e.action_id]  # the terminal's codes: 1 bright, 2 dim, 31 red, 32 green
    if e.answer_start is not None and e.question["golden_answers"]:
        colours[e.answer_start:] = [32 if e.reward else 31] * (len(e.ids) - e.answer_start)
    print("\n" + e.question["question"], f"-> reward {e.reward:g}" if e.question["golden_answers"] else "")
    shown = range(0 if with_prompt else e.action_id.index(1), len(e.ids))
    for colour, positions in groupby(shown, key=colours.__getitem__):
        text = env.tok.decode([e.ids[t] for t in positions])
        if sys.stdout.isatty():
            text = f"\033[{colour}m{text}\033[0m"
        elif colour == 2:
            text = f"[[{text}]]"
        print(text, end="")
    print("\n")

def sparkline(values):
    values = values[::math.ceil(len(values) / 60)]  # at most 60 characters
    low, high = min(values), max(values)
    return "".join("▁▂▃▄▅▆▇█"[int(7 * (value - low) / (high - low or 1))] for value in values)

CURVES = "eval_em reward logp_correct displaced entropy grad_norm".split()
def report(runs, plot):
    """Prints each run's curves, and draws them into the file `plot`, if any. runs: {name: history}."""
    if plot:
        from matplotlib import pyplot
        pyplot.figure(figsize=(12, 6), layout="constrained")
    for run, history in runs.items():
        print(f"\n{run}")
        for i, name in enumerate(CURVES):
            rows = [row for row in history if row.get(name) is not None]
            values = [row[name] for row in rows]
            if values:
                print(f"  {name:13}{values[0]:8.3f} ->{values[-1]:8.3f}  {sparkline(values)}")
            if plot:
                pyplot.subplot(2, 3, i + 1, title=name)
                pyplot.plot([row["step"] for row in rows], values, label=run)
    if plot:
        pyplot.legend()
        pyplot.savefig(plot)

def load_model(cfg, passages, questions):
    """(tokenizer, model) of --model: from hub or disk, or the built-in ones, which know the corpus' words."""
    with supplied(f"--model {cfg.model}"):
        if cfg.model == "tiny":
            tok, model = tiny_agent(passages, questions, cfg.top_k)
        else:
            # Not AutoTokenizer: it goes by the model's type, and would take Qwen2's for our saved agent.
            tok = PreTrainedTokenizerFast.from_pretrained(cfg.model)
            model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype="float32", attention_dropout=0,
                                                         attn_implementation="sdpa")
        if cfg.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # in train mode, see token_logps()
        model = shard(model, cfg) if dist.is_initialized() else model.to(DEVICE)
        check_model(model, tok)
    return tok, model

@torch.no_grad()
def check_model(model, tok):
    """Refuses a model whose own forward gives other logits in training, or would do so in a longer text."""
    kinds = {vars(model.config).get("sliding_window") or None, *(vars(model.config).get("layer_types") or [])}
    check(kinds <= {None, "full_attention"}, f"--model: sliding_window or layer_types {kinds}: not supported")
    check(len(tok) <= model.get_input_embeddings().num_embeddings, "--model: tokenizer beyond embedding")
    ids = tok.encode(PROMPT)
    ours = feed(model.eval(), SlotCache(1, len(ids)), {0: SimpleNamespace(ids=ids, read=0)})        # (1, V)
    theirs = type(model).forward(model.train(), torch.tensor([ids], device=DEVICE)).logits[:, -1].float()
    gap = (ours.log_softmax(dim=1) - theirs.log_softmax(dim=1)).abs().mean().item()
    check(gap < 0.1, f"--model: log-probabilities in a rollout are off by {gap:.2g}")

@supplied("--warm_steps needs questions with 'hops' and a 'path' in the corpus", (LookupError, TypeError))
def warm_start(model, env, passages, questions, cfg):
    """Supervised steps on the actions of scripted episodes, so that GRPO's model knows the format."""
    optimizer = adamw(model, cfg.warm_learning_rate, cfg, betas=(0.9, 0.98))
    scheduler = get_scheduler("linear", optimizer, cfg.warm_steps // 10, cfg.warm_steps)
    learner = SimpleNamespace(model=model, optimizer=optimizer, scheduler=scheduler)
    for episodes in tqdm(lessons(env, passages, questions, cfg.warm_steps), "warm start", cfg.warm_steps):
        batch = collate(episodes, len(episodes))
        micro_batches = next(split(episodes, 1, 1, cfg.micro_batch_tokens))
        for rows, action_id in shares(micro_batches, batch.action_id):
            logp, _ = token_logps(model, batch.ids[rows], action_id)
            (-logp.sum() / batch.action_tokens.sum() * WORLD).backward()
        optimizer_step(learner)

@supplied("the prompt of a question")
def fitting(env, questions):
    """The questions of --hops hops whose prompts leave room for an answer."""
    hops, room = env.cfg.hops, env.max_length
    some = [q for q in questions if hops in (0, q.get("hops", hops)) and len(env.reset(q).ids) < room]
    check(some or not questions, f"no question has --hops {hops} and fits into the model's context")
    print(len(some), "of", len(questions), "questions fit --hops and the model's context")
    return some

@supplied("memory is full; lower --micro_batch_tokens or --rollout_batch", torch.OutOfMemoryError)
@supplied("a file, the retrieval server, or Ctrl-C", (OSError, KeyboardInterrupt, dcp.CheckpointException))
def main(argv=None):
    cfg = parse_config(argv)
    start_processes(cfg)
    set_seed(cfg.seed % 2 ** 32)
    torch.set_autocast_enabled(DEVICE, cfg.dtype == "bfloat16")  # not the weights: they would swallow updates
    torch.set_autocast_dtype(DEVICE, torch.bfloat16)
    torch.set_autocast_cache_enabled(False)  # a kept cast is stale after an update; only rollout() keeps any
    corpus = cfg.corpus or str(Path(__file__).with_name("tiny_corpus.jsonl"))
    passages = load_corpus(corpus)
    questions = [] if cfg.ask or cfg.eval else load_questions(cfg.train_data or corpus, "train")
    asked = [{"question": cfg.ask, "golden_answers": []}]
    held_out = asked if cfg.ask else load_questions(cfg.eval_data or corpus, "test")
    everything = questions + held_out  # known to the tokenizer; the warm start swaps the names in them
    tok, model = load_model(cfg, passages, everything)
    retriever = HTTPRetriever(cfg.retriever_url) if cfg.retriever_url else BM25(passages)
    env = Environment(tok, retriever, cfg, model.config.max_position_embeddings)
    eos = model.generation_config.eos_token_id  # None, a number or several
    env.eos_ids.update(eos if isinstance(eos, list) else [eos])
    questions, held_out = fitting(env, questions), fitting(env, held_out)
    noisy_env = copy.copy(env)
    noisy_env.retriever = ErringRetriever(retriever, passages, cfg.retrieval_noise)
    if cfg.ask:
        show(env, *rollout(model, env, held_out, temperature=0.0))
        return
    several = len(cfg.llds_lambda) > 1
    stamp = time.strftime(f"%y%m%d-%H%M%S-{os.getpid()}")
    out = everyone(Path(cfg.resume or cfg.output_dir or f"runs/{Path(cfg.model).name}-{stamp}"))[0]
    if RANK == 0:
        with supplied(f"--output_dir {out}"):
            out.mkdir(parents=True, exist_ok=bool(cfg.resume))  # a new folder is claimed before all computing
    flags = vars(cfg) | {"output_dir": "", "resume": ""}
    write(out / "flags.json", flags)
    warm_start(model, env, passages, everything, cfg)  # with --resume too: no checkpoint keeps these weights
    if not cfg.resume:
        scores = evaluate(model, env, held_out)
        print("held-out questions:", *(f" {name} {value:.3f}" for name, value in scores.items()))
    if cfg.eval:
        write(out / "eval.json", scores | {"flags": vars(cfg)})
        return
    weights = model.state_dict().items() if several or cfg.beta else []
    runs, start = {}, {name: x.to("cpu", copy=True) for name, x in weights}  # takes no room on the GPU
    for llds_lambda in cfg.llds_lambda:
        folder = out / f"lambda_{llds_lambda:g}" if several else out
        folder.mkdir(exist_ok=True)
        write(folder / "flags.json", flags | {"llds_lambda": [llds_lambda]})
        print(f"\nlambda {llds_lambda:g}: {folder}")
        learner = start_run(model, start, llds_lambda, cfg)
        train(learner, noisy_env, env, questions, held_out, folder, cfg)
        runs[f"lambda {llds_lambda:g}"] = learner.history
    report(runs, out / "curves.png" if cfg.plot and RANK == 0 else None)

if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal without the curves' characters is no reason to stop
    main()
    if dist.is_initialized():
        sys.stdout.flush()
        os._exit(0)  # at once: in an ordinary exit Gloo's threads abort one process in ten or so
